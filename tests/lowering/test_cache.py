"""The kernel cache: a second process compiles nothing, and a damaged kernel is compiled again and never run."""

from __future__ import annotations

import json
import os
import shutil
import signal
import stat
import subprocess
import sys
import warnings
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from lowering import cache
from lowering.cpu import build as kernels
from ramnet.ops import reference
from schedules.cpu import AddressDecode
from schedules.workload import Workload

pytest.importorskip("tvm", reason="the CPU kernels need tvm: pip install 'ramnet[tvm]'")

WORK = Workload(op="address_decode", shape={"R": 8, "U": 2, "P": 2, "K": 2})
SCHEDULE = AddressDecode(lanes=8, unroll=0, parallel=False)
LOGITS = torch.randn(8, 2, 2, generator=torch.Generator().manual_seed(0))


UNSHARE = ["unshare", "--map-root-user", "--mount"]
CAN_MOUNT = (
    shutil.which("unshare") is not None and not subprocess.run([*UNSHARE, "true"], capture_output=True).returncode
)


@pytest.fixture
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty cache, with no kernel loaded."""
    monkeypatch.setenv("RAMNET_CACHE", str(tmp_path / "cache"))
    forget(monkeypatch)
    return tmp_path / "cache"


def forget(monkeypatch: pytest.MonkeyPatch) -> None:
    """Reset the caches of this process, as if it had just started."""
    monkeypatch.setattr(kernels, "_loaded", {})
    for remembered in (cache.notice, cache._folder, kernels.linker):
        remembered.cache_clear()


def decodes() -> bool:
    """Lower the kernel, check its result, and return whether it was compiled."""
    kernel = kernels.lower(WORK, "cpu", SCHEDULE)
    slots, weights = torch.empty(8, 2, dtype=torch.int32), torch.empty(8, 2)
    kernel.function(LOGITS, slots, weights)
    assert torch.allclose(weights, reference.address_decode(LOGITS, 2)[1], rtol=1e-5)
    return kernel.compiled_now


def decodes_with_a_notice(text: str) -> None:
    """Check that the kernel works, is compiled once in this process, and one warning says why it is not cached."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        assert decodes() and decodes()
    said = [str(warning.message) for warning in caught]
    assert len(said) == 1 and text in said[0] and said[0].endswith("kernels are compiled anew in each process"), said


def names(folder: Path) -> list[str]:
    return sorted(path.relative_to(folder).as_posix() for path in folder.rglob("*"))


def library(place: Path) -> Path:
    (found,) = (place / "kernels").glob("*.so")
    return found


def test_kernels_are_cached_with_their_digest_in_a_private_folder(place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert decodes()
    assert names(place) == ["kernels", f"kernels/{library(place).name}", f"kernels/{library(place).name}.sha256"]
    assert stat.S_IMODE((place / "kernels").stat().st_mode) == 0o700
    forget(monkeypatch)
    monkeypatch.setattr(kernels, "compile_now", None)
    assert not decodes()


def put(path: Path, data: bytes) -> None:
    """Replace the file, as this process has the old one mapped."""
    path.unlink()
    path.write_bytes(data)


def empty(path: Path) -> None:
    put(path, b"")


def cut(path: Path) -> None:
    put(path, path.read_bytes()[:-1])


def alter(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 0x80  # the digest stays ASCII
    put(path, data)


def plant(path: Path) -> None:
    """A library that creates a file when it is loaded."""
    source = path.with_suffix(".c")
    code = f'__attribute__((constructor)) static void f(void) {{ fopen("{path.parent.parent}/ran", "w"); }}'
    source.write_text(f"#include <stdio.h>\n{code}\n")
    path.unlink()
    subprocess.run(["cc", "-shared", "-fPIC", "-o", path, source], check=True)
    source.unlink()


@pytest.fixture(scope="module")
def filled(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A cache with the kernel."""
    folder = tmp_path_factory.mktemp("filled") / "cache"
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("RAMNET_CACHE", str(folder))
        forget(patch)
        assert decodes()
    cache._folder.cache_clear()
    return folder


@pytest.mark.parametrize("damage", [empty, cut, alter, plant, Path.unlink])
@pytest.mark.parametrize("what", ["library", "digest"])
def test_a_damaged_kernel_is_not_loaded_but_compiled_again(
    what: str, damage: Callable[[Path], None], filled: Path, place: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    shutil.copytree(filled, place)
    assert not decodes()
    good = library(place)
    damage(good if what == "library" else good.with_name(f"{good.name}.sha256"))
    forget(monkeypatch)
    assert decodes()
    assert not (place / "ran").exists()
    forget(monkeypatch)
    assert not decodes()


@pytest.mark.parametrize("mode", [0o777, 0o770, 0o702])
def test_a_folder_that_others_may_write_to_is_not_used(place: Path, mode: int) -> None:
    (place / "kernels").mkdir(parents=True)
    (place / "kernels").chmod(mode)
    decodes_with_a_notice(f"{place / 'kernels'} can be written to by others, and its kernels may be theirs")
    assert names(place) == ["kernels"]


def test_a_folder_that_others_may_read_is_made_private(place: Path) -> None:
    (place / "kernels").mkdir(parents=True)
    (place / "kernels").chmod(0o755)
    assert decodes()
    assert stat.S_IMODE((place / "kernels").stat().st_mode) == 0o700


def test_a_folder_that_was_removed_is_made_again_and_stays_where_it_was(
    place: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    relative = f"kept-{tmp_path.name}"
    monkeypatch.setenv("RAMNET_CACHE", relative)
    monkeypatch.chdir(tmp_path)
    assert decodes()
    monkeypatch.setattr(kernels, "_loaded", {})
    shutil.rmtree(tmp_path / relative)
    monkeypatch.chdir("/")
    before = os.umask(0o002)
    try:
        assert decodes()
    finally:
        os.umask(before)
    assert stat.S_IMODE((tmp_path / relative / "kernels").stat().st_mode) == 0o700
    assert not Path("/", relative).exists()


def test_a_folder_that_was_removed_and_made_again_by_others_is_not_used(
    place: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert decodes()
    shutil.rmtree(place / "kernels")
    cache.find("kernel.so")
    assert stat.S_IMODE((place / "kernels").stat().st_mode) == 0o700
    forget(monkeypatch)
    (place / "kernels").chmod(0o777)
    decodes_with_a_notice("can be written to by others")


def test_a_folder_from_which_no_code_is_loaded_is_not_used(place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cache.os, "statvfs", lambda _: SimpleNamespace(f_flag=os.ST_NOEXEC))
    decodes_with_a_notice(f'{place / "kernels"} is on a disk that is mounted as "noexec"')


def test_a_folder_whose_name_is_no_text_is_not_used(place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RAMNET_CACHE", f"{place}\udcff")
    decodes_with_a_notice("cache\\xff/kernels' is not UTF-8")


def test_a_folder_of_another_user_is_not_used(place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    decodes()
    forget(monkeypatch)
    monkeypatch.setattr(cache.os, "geteuid", lambda: os.getuid() + 1)
    decodes_with_a_notice(f"{place / 'kernels'} belongs to user {os.getuid()}, not to {os.getuid() + 1}")


def test_a_link_instead_of_the_folder_is_not_followed(place: Path, tmp_path: Path) -> None:
    place.mkdir()
    (tmp_path / "elsewhere").mkdir()
    (place / "kernels").symlink_to(tmp_path / "elsewhere")
    decodes_with_a_notice(f"{place / 'kernels'} is a link; set RAMNET_CACHE to a folder of your own")
    assert names(tmp_path / "elsewhere") == []


def test_a_folder_that_cannot_be_created_only_disables_the_cache(place: Path) -> None:
    place.write_text("a file")
    decodes_with_a_notice(str(place))


FULL_DISKS = """
import os, sys, tempfile, warnings
import pytest
from tests.lowering import test_cache
for folder in sys.argv[1:]:
    os.environ["RAMNET_CACHE"] = tempfile.tempdir = os.environ["TMPDIR"] = folder
    with warnings.catch_warnings(record=True) as caught, pytest.MonkeyPatch.context() as patch:
        warnings.simplefilter("always")
        test_cache.forget(patch)
        assert test_cache.decodes()
    print(*(warning.message for warning in caught))
"""


@pytest.mark.skipif(not CAN_MOUNT, reason="a small disk needs unshare --map-root-user --mount")
def test_a_full_disk_only_disables_the_cache(tmp_path: Path) -> None:
    """On a disk of 4 KB and on one of 12, in one process, as its imports take most of the time."""
    places = tmp_path / "4", tmp_path / "12"
    mounts = [f"mount -t tmpfs -o size={place.name}k tmpfs {place}" for place in places]
    shell = " && ".join([*mounts, '"$0" -c "$@"', *(f"ls -A {place}/kernels" for place in places)])
    for place in places:
        place.mkdir()
    command = [*UNSHARE, "sh", "-c", shell, sys.executable, FULL_DISKS, *map(str, places)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    said = done.stdout.splitlines()
    assert len(said) == 2, said  # and the folders of kernels are empty
    for place, line in zip(places, said, strict=True):
        assert line.startswith(f"a compiled kernel cannot be kept in {place / 'kernels'}: "), line
        assert "No space left on device" in line


def test_without_a_linker_kernels_work_but_are_not_cached(place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("lowering.compilers.shutil.which", lambda _: None)
    decodes_with_a_notice("there is no C++ compiler to link with")
    assert names(place) == ["kernels"]


def test_what_a_killed_process_left_is_cleared_at_the_next_start(place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    code = f"""
import os, signal
from lowering import cache
cache.keep("x.so", lambda aside: (aside.write_text("half"), os.kill(os.getpid(), signal.{signal.SIGKILL.name})))
"""
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == -signal.SIGKILL
    left = names(place)
    assert len(left) == 3 and left[2].endswith("/x.so"), left
    forget(monkeypatch)
    decodes()
    assert not any("x.so" in name for name in names(place))


FIRST_RESULT = """
import json, os, sys, torch, lowering, lowering.cpu.build, ramnet
logits = torch.randn(40, 2, 3, generator=torch.Generator().manual_seed(0))
with lowering.use("cpu"):
    slots, weights = ramnet.ops.address_decode(logits, 3)
compiled = [kernel.compiled_now for kernel in lowering.cpu.build._loaded.values()]
found = json.dumps({"compiled": compiled, "tvm": "tvm" in sys.modules, "sum": float(weights.sum())})
os.write(1, f"{found}\\n".encode())  # at once, as another process writes to the same pipe
"""
# Two processes at once, then one. They are forked after torch's import, which takes seconds.
TWO_THEN_ONE = """
import os, sys, torch
for together in (2, 1):
    for _ in range(together):
        if not os.fork():
            exec(sys.argv[1], {})
            os._exit(0)
    for _ in range(together):
        assert os.wait()[1] == 0
"""


def test_processes_that_begin_at_once_all_get_a_kernel_and_a_later_one_compiles_nothing(place: Path) -> None:
    said = subprocess.check_output([sys.executable, "-c", TWO_THEN_ONE, FIRST_RESULT], text=True)
    *first, later = map(json.loads, said.splitlines())
    assert len(first) == 2
    assert len({each["sum"] for each in (*first, later)}) == 1
    assert [True] in [each["compiled"] for each in first] and later["compiled"] == [False]
    assert not later["tvm"], "the compiler was imported though nothing was compiled"
