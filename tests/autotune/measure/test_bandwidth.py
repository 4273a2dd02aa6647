"""The measured bandwidth: the bytes read and the choice of a loop, with simulated times."""

from __future__ import annotations

import ctypes
import gc
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from autotune.measure import bandwidth as bw
from autotune.measure import native
from autotune.measure.timing import Timing

KB = 1024


class Library:
    """Fake loops that record their calls."""

    def __init__(self) -> None:
        self.allocated: list[int] = []
        self.released: list[int | None] = []
        self.read: list[tuple[int, ...]] = []

    def loop_count(self) -> int:
        return 3

    def allocate(self, size: int) -> int:
        self.allocated.append(size)
        return 1

    def release(self, data: int) -> None:
        self.released.append(data)

    def read_bytes(self, loop: int, data: int, size: int, total: int, threads: int, bits: object) -> int:
        self.read.append((loop, size, total, threads))
        return total


@pytest.fixture
def library(monkeypatch: pytest.MonkeyPatch) -> Library:
    """Call each candidate once; the second takes half a second, the others one."""
    library = Library()

    def interleaved(calls: dict[str, Callable[[], object]], rounds: int, seconds: float) -> dict[str, Timing]:
        for call in calls.values():
            call()
        return {name: Timing((0.5 if i == 1 else 1.0,), 1) for i, name in enumerate(calls)}

    monkeypatch.setattr(bw, "_library", lambda: library)
    monkeypatch.setattr(bw, "interleaved", interleaved)
    monkeypatch.setattr(bw, "cache_sizes", lambda: {2: 1 << 20, 3: 1 << 25})
    return library


def test_the_fastest_of_the_loops_is_taken(library: Library) -> None:
    found = bw.reader("L2", threads=2)
    assert (found.how, found.bandwidth) == ("loop 1", 2 * (1 << 26))
    assert bw.bandwidth("DRAM") == 2 * (1 << 29)
    library.read.clear()
    assert found.read(1000) == 1000
    assert library.read == [(1, 2 * (1 << 18), 1000, 2)]


@pytest.mark.parametrize(
    ("level", "threads", "last", "size"),
    [
        ("L2", 1, 1 << 25, 1 << 18),
        ("L2", 3, 1 << 25, 3 << 18),
        ("DRAM", 1, 1 << 25, 1 << 29),
        ("DRAM", 1, 1 << 20, 1 << 28),
    ],
)
def test_a_buffer_is_a_quarter_of_each_cores_l2_or_sixteen_times_the_last_cache(
    library: Library, monkeypatch: pytest.MonkeyPatch, level: str, threads: int, last: int, size: int
) -> None:
    monkeypatch.setattr(bw, "cache_sizes", lambda: {2: 1 << 20, 3: last})
    bw.reader(level, threads)
    assert library.allocated == [size]


def test_a_buffer_is_freed_and_a_failed_allocation_is_an_error(library: Library) -> None:
    bw.reader("L2")
    gc.collect()
    assert library.released == [1]
    library.allocate = lambda size: 0  # type: ignore[method-assign]
    with pytest.raises(MemoryError, match="262144 bytes for measuring the bandwidth could not be alloc"):
        bw.reader("L2")


def test_caches_are_as_large_as_the_system_says(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(bw, "Path", lambda _: tmp_path)
    assert bw.cache_sizes() == {2: 1 << 20, 3: 1 << 25}, "common sizes where it does not"
    caches = [("1", "Data", "48K"), ("1", "Instruction", "32K"), ("2", "Unified", "2048K"), ("3", "Unified", "unknown")]
    for i, cache in enumerate(caches):
        (tmp_path / f"index{i}").mkdir()
        for name, text in zip(("level", "type", "size"), cache, strict=True):
            (tmp_path / f"index{i}" / name).write_text(f"{text}\n")
    (tmp_path / "index4").mkdir()
    (tmp_path / "index4" / "level").write_text("2\n")  # on ARM, without a size
    assert bw.cache_sizes() == {1: 48 << 10, 2: 2 << 20, 3: 1 << 25}


@pytest.fixture(scope="module")
def compiled(cpp: None) -> Any:
    return bw._library()


@pytest.mark.parametrize("threads", [1, 2])
def test_every_loop_reads_every_byte(compiled: Any, threads: int) -> None:
    size = 64 * KB
    buffer, bits = bw._Buffer(compiled, size), ctypes.c_uint64()
    ctypes.memset(buffer.data, 0, size)
    for loop in range(compiled.loop_count()):
        for place in range(0, size, 1021):
            byte = ctypes.c_char.from_address(buffer.data + place)
            byte.value = b"\x10"
            assert compiled.read_bytes(loop, buffer.data, size, size, threads, ctypes.byref(bits)) == size
            assert bits.value == 0x10 << 8 * (place % 8), (loop, place)
            byte.value = b"\0"


@pytest.mark.parametrize("threads", [1, 2])
def test_the_requested_bytes_are_read(compiled: Any, threads: int) -> None:
    buffer = bw._Buffer(compiled, 64 * KB)
    for loop in range(compiled.loop_count()):
        read = bw._native_read(compiled, buffer, loop, threads)
        assert [read(kb * KB) // KB for kb in (16, 64, 128, 200)] == [16, 64, 128, 200]
        assert (100 - threads) * KB <= read(100 * KB - 1) < 100 * KB, "less than a turn of the loop is left out"


def test_an_unknown_level_is_named() -> None:
    with pytest.raises(ValueError, match="'L7'"):
        bw.reader("L7")


def test_without_a_compiler_torch_reads(library: Library, monkeypatch: pytest.MonkeyPatch) -> None:
    def missing() -> None:
        raise native.NoCompilerError("no C++ compiler was found")

    summed: list[tuple[int, int]] = []
    before = torch.get_num_threads()
    monkeypatch.setattr(bw, "_library", missing)
    monkeypatch.setattr(bw, "cache_sizes", lambda: {2: 1 << 20})
    monkeypatch.setattr(bw, "_TRIAL", {"L2": 1 << 20})
    found = bw.reader("L2", threads=2)
    assert found.how == "torch.sum, because no C++ compiler was found"
    monkeypatch.setattr(torch.Tensor, "sum", lambda self: summed.append((self.nbytes, torch.get_num_threads())))
    assert found.read((1 << 20) + 8) == (1 << 20) + 8
    assert summed == [(1 << 19, 2)] * 2 + [(8, 2)]
    assert torch.get_num_threads() == before


def test_without_a_compiler_the_reason_says_what_to_install(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(native.NoCompilerError, match="no C\\+\\+ compiler was found; install g\\+\\+"):
        native.load("any", "")


def test_a_library_is_built_once(cpp: None, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("RAMNET_CACHE", str(tmp_path))
    source = 'extern "C" int answer() { return 42; }'
    assert native.load("answer", source).answer() == 42
    (built,) = (tmp_path / "kernels").glob("*.so")
    stamp = built.stat().st_mtime_ns
    assert native.load("answer", source).answer() == 42
    assert built.stat().st_mtime_ns == stamp
    assert native.load("answer", source.replace("42", "43")).answer() == 43
    with pytest.raises(native.NoCompilerError, match=r"failed: .*error"):
        native.load("broken", "this is not C++")
    assert len(list(built.parent.glob("*.so"))) == 2


def test_a_library_is_built_where_nothing_can_be_kept(
    cpp: None, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    (tmp_path / "cache").write_text("a file")
    monkeypatch.setenv("RAMNET_CACHE", str(tmp_path / "cache"))
    with pytest.warns(UserWarning, match="set RAMNET_CACHE to a folder of your own"):
        assert native.load("answer", 'extern "C" int answer() { return 42; }').answer() == 42
