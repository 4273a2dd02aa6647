"""The measured bandwidth."""

import pytest

from autotune import bandwidth as bw
from autotune import native
from autotune.measure import interleaved


def test_a_core_reads_its_cache_faster_than_memory():
    cache, memory = bw.reader("L2"), bw.reader("DRAM")
    assert cache.bandwidth > 1.5 * memory.bandwidth
    assert 1e9 < memory.bandwidth < 1e12


def test_reading_twice_as_much_takes_twice_as_long():
    read = bw.reader("L2").read
    timings = interleaved({"once": lambda: read(1 << 26), "twice": lambda: read(1 << 27)}, rounds=15, seconds=5)
    # The quickest of each, as other processes may hold the core for a while.
    assert min(timings["twice"].samples) / min(timings["once"].samples) == pytest.approx(2, rel=0.2)


def test_an_unknown_level_is_named():
    with pytest.raises(ValueError, match="'L7'"):
        bw.reader("L7")


def test_without_a_compiler_torch_reads(monkeypatch, tmp_path):
    monkeypatch.setenv("PATH", str(tmp_path))
    bw._library.cache_clear()
    found = bw.reader("L2")
    bw._library.cache_clear()
    assert found.how.startswith("torch")
    assert "no C++ compiler" in found.how
    assert found.bandwidth > 1e9


def test_a_library_is_built_once(monkeypatch, tmp_path):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    source = 'extern "C" int answer() { return 42; }'
    try:
        assert native.load("answer", source).answer() == 42
    except native.NoCompilerError as problem:
        pytest.skip(str(problem))
    (built,) = (tmp_path / "ramnet" / "native").iterdir()
    stamp = built.stat().st_mtime_ns
    assert native.load("answer", source).answer() == 42
    assert built.stat().st_mtime_ns == stamp
    with pytest.raises(native.NoCompilerError, match="failed"):
        native.load("broken", "this is not C++")
    assert [path.name for path in built.parent.iterdir()] == [built.name]
