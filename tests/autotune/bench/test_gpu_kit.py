"""The kit for a machine with a GPU and without a network: what it has, and what it refuses."""

from __future__ import annotations

import json
import subprocess
import sys
import tarfile
import zipfile
from pathlib import Path
from typing import Any

import pytest

from autotune.bench.gpu import kit, kit_kernels
from autotune.bench.gpu.scan import untuned
from lowering.gpu.offline import NoCompilerError
from lowering.gpu.resources import Compiled, Resources, Work
from schedules.kinds import default_schedule
from tests.lowering.gpu.of_340m import workload


def wheel(folder: Path, name: str, *requires: str) -> Path:
    path = folder / f"{name}-1.0-py3-none-any.whl"
    info = f"{name}-1.0.dist-info"
    files = {
        f"{name}.py": "VALUE = 7\n",
        f"{info}/METADATA": f"Metadata-Version: 2.1\nName: {name}\nVersion: 1.0\n"
        + "".join(f"Requires-Dist: {each}\n" for each in requires),
        f"{info}/WHEEL": "Wheel-Version: 1.0\nGenerator: test\nRoot-Is-Purelib: true\nTag: py3-none-any\n",
        f"{info}/RECORD": "",
    }
    with zipfile.ZipFile(path, "w") as archive:
        for file, text in files.items():
            archive.writestr(file, text)
    return path


def test_what_the_wheels_need_is_in_the_kit_or_on_the_machine(tmp_path: Path) -> None:
    needs = ("other_one>=1", "torch>=2", "greenlet; extra == 'asyncio'", "old; python_version < '3.12'", "missing")
    wheels = [wheel(tmp_path, "one", *needs), wheel(tmp_path, "other_one")]
    assert kit.lacking(wheels, {"torch"}) == {"missing": "one-1.0-py3-none-any.whl"}


def test_what_is_missing_is_named(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    with pytest.raises(kit.IncompleteError, match=r"constraints\.txt has no version of optuna, which the kit needs"):
        kit.pinned("optuna", "optuna-other==1\nclick==2\n")
    done = subprocess.CompletedProcess([], 1, "", "looking\nERROR: no distribution for one==1\n")
    monkeypatch.setattr(subprocess, "run", lambda *_, **__: done)
    with pytest.raises(kit.IncompleteError, match="pip cannot download one==1: ERROR: no distribution for one==1"):
        kit.download(["one==1"], tmp_path)
    monkeypatch.setattr(kit, "MOST_BYTES", 3)
    (tmp_path / "1").mkdir()
    (tmp_path / "1" / "file").write_text("four")
    with pytest.raises(kit.IncompleteError, match="1 has 4 bytes; a part may have 3"):
        kit.require_small(tmp_path)


def test_every_package_has_its_version() -> None:
    constraints = (kit.ROOT / "constraints.txt").read_text()
    assert all(kit.pinned(name, constraints) for name in (*kit.PACKAGES, *kit.TVM))


def test_the_kit_installs_wheels_binaries_and_tvm(tmp_path: Path) -> None:
    """With RAMNET_PYTHON, as there; TVM is a wheel in two parts."""
    first, second, third = (tmp_path / "kit" / name for name in "123")
    (first / "wheels").mkdir(parents=True)
    (first / "kernels").mkdir()
    wheel(first / "wheels", "one")
    (first / "kernels" / "a.cubin").write_bytes(b"code")
    (first / "modelled.json").write_text("{}")
    (first / "kernels").chmod(0o777)  # as a copy may be
    (first / "install.sh").write_text(kit.INSTALL)
    kit.compress(wheel(tmp_path, "tvm"), second / "tvm.tar.xz.0", third / "tvm.tar.xz.1")
    wheel(second, "ffi")
    done = subprocess.run(
        ["sh", "-c", 'eval "$(sh kit/1/install.sh there)"; cd /; exec "$RAMNET_PYTHON" -c "import one, tvm, ffi, os;'
         ' print(tvm.VALUE, os.environ[\'RAMNET_CACHE\'], os.environ[\'RAMNET_MODELLED\'])"'],
        capture_output=True, text=True, check=False, cwd=tmp_path,
        env={"RAMNET_PYTHON": sys.executable, "PATH": "/usr/bin:/bin"},
    )  # fmt: skip
    there = tmp_path / "there"
    assert done.stdout.split() == ["7", f"{there}/cache", f"{there}/modelled.json"], done.stderr
    assert (there / "cache" / "kernels" / "a.cubin").read_bytes() == b"code"
    assert all(folder.stat().st_mode & 0o777 == 0o700 for folder in (there / "cache", there / "cache" / "kernels"))


def test_tvms_sources_are_left_out(tmp_path: Path) -> None:
    whole = wheel(tmp_path, "tvm")
    with zipfile.ZipFile(whole, "a") as made:
        made.writestr("tvm/3rdparty/cutlass/a.hpp", "text")
        made.writestr("tvm/lib/a.so", "text")
    kit.compress(whole, tmp_path / "0", tmp_path / "1")
    (tmp_path / "all").write_bytes((tmp_path / "0").read_bytes() + (tmp_path / "1").read_bytes())
    with tarfile.open(tmp_path / "all") as archive:
        names = archive.getnames()
    assert "tvm/lib/a.so" in names and not any("3rdparty" in name for name in names)


def test_every_schedule_of_the_tuner_is_compiled_and_those_of_the_same_binary_together() -> None:
    found = kit_kernels.groups()
    backward = [group for group in found if group.workload == workload("memory_scan_backward") and group.tuned]
    shared = [group for group in backward if group.schedules[0].form == "shared"]  # type: ignore[attr-defined]
    assert all({schedule.heads for schedule in group.schedules} == {0, 16, 64} for group in shared)  # type: ignore[attr-defined]
    named = {(group.workload.kernel_name, schedule) for group in found for schedule in group.schedules}
    for op in ("memory_scan", "memory_scan_backward"):
        narrow = workload(op, "float32")
        assert (narrow.kernel_name, untuned(narrow, "shared")) in named


def test_a_schedule_that_fails_is_told_and_a_missing_compiler_raises(monkeypatch: pytest.MonkeyPatch) -> None:
    step = workload("memory_step")
    good = default_schedule(step, "h100")
    bad = good.model_copy(update={"threads": 128})

    def compiled(workload: Any, target: str, schedule: Any) -> list[Compiled]:
        if schedule == bad:
            raise RuntimeError("ptxas failed")
        return [Compiled("step", Work(64, 64, 1e6, 1e6), Resources(32, 0, 0, 0), 100.0)]

    monkeypatch.setattr(kit_kernels, "compile_for", compiled)
    done = kit_kernels.compiled(kit_kernels.Group(step, [bad, good], True))
    assert [problem.rpartition(": ")[2] for problem in done.problems] == ["ptxas failed"]
    (seconds,) = done.seconds["h200"][step.name].values()
    assert 0 < seconds < 1

    def missing(*_: Any) -> Any:
        raise NoCompilerError("no nvcc")

    monkeypatch.setattr(kit_kernels, "compile_for", missing)
    with pytest.raises(NoCompilerError):
        kit_kernels.compiled(kit_kernels.Group(step, [good], True))


def test_modelled_times_are_read_by_schedule(tmp_path: Path) -> None:
    step = workload("memory_step")
    schedule = default_schedule(step, "h100")
    path = tmp_path / "modelled.json"
    path.write_text(json.dumps({"h100": {step.name: {schedule.model_dump_json(): 2e-6}}}))
    assert kit_kernels.read(path, "h100", step) == {schedule: 2e-6}
    assert kit_kernels.read(path, "h200", step) == kit_kernels.read(None, "h100", step) == {}
