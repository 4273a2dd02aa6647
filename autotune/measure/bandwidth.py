"""Measures how fast this machine reads memory, which bounds the time of every op that accesses a number of bytes."""

from __future__ import annotations

import ctypes
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from functools import cache, partial
from pathlib import Path

import torch

from autotune.measure import native
from autotune.measure.timing import interleaved

# A buffer is read in blocks of `Streams` places at once, `Unroll` registers in flight from each. Vector types are
# GCC's and clang's own, so that every CPU gets its widest loads without intrinsics; or-ing is free beside a load.
_SOURCE = r"""
#include <cstddef>
#include <cstdint>
#include <cstdlib>
#include <sys/mman.h>
#include <thread>
#include <vector>

#if defined(__AVX512F__)
constexpr int kBytes = 64;
#elif defined(__AVX__)
constexpr int kBytes = 32;
#else
constexpr int kBytes = 16;
#endif

template <int Bytes>
struct Of { typedef uint64_t Vector __attribute__((vector_size(Bytes))); };

template <int Bytes, int Streams, int Unroll>
static size_t read(const char* data, size_t size, size_t total, uint64_t* bits) {
  using Vector = typename Of<Bytes>::Vector;
  const size_t part = size / Streams / (Bytes * Unroll) * (Bytes * Unroll);
  Vector seen[Streams * Unroll] = {};
  size_t done = 0;
  for (size_t end; done < total; done += end * Streams) {
    const size_t left = (total - done) / Streams / (Bytes * Unroll) * (Bytes * Unroll);
    end = left < part ? left : part;
    if (end == 0) break;
    for (size_t at = 0; at < end; at += Bytes * Unroll)
      for (int s = 0; s < Streams; ++s)
        for (int u = 0; u < Unroll; ++u)
          seen[s * Unroll + u] |= *reinterpret_cast<const Vector*>(data + s * part + at + u * Bytes);
    __asm__ volatile("" ::: "memory");  // the next pass reads memory again
  }
  for (auto& vector : seen)
    for (size_t i = 0; i < Bytes / 8; ++i) *bits |= vector[i];
  return done;
}

using Loop = size_t (*)(const char*, size_t, size_t, uint64_t*);
static const Loop loops[] = {
    read<kBytes, 1, 4>, read<kBytes, 1, 8>, read<kBytes, 2, 4>, read<kBytes, 4, 2>, read<kBytes, 4, 4>,
    read<kBytes / 2, 1, 8>, read<kBytes / 2, 2, 4>, read<kBytes / 2, 4, 4>,
};

extern "C" int loop_count() { return sizeof loops / sizeof *loops; }

extern "C" char* allocate(size_t size) {
  const size_t page = size_t{1} << 21;
  size = (size + page - 1) / page * page;
  char* data = static_cast<char*>(std::aligned_alloc(page, size));
  if (!data) return nullptr;
#ifdef MADV_HUGEPAGE
  madvise(data, size, MADV_HUGEPAGE);
#endif
  for (size_t i = 0; i < size; i += 64) data[i] = 1;
  return data;
}

extern "C" void release(char* data) { std::free(data); }

// Reads `total` bytes, or a few less, going round the buffer of `size`; each thread has its own part of it. Returns how
// many were read; `bits` are those that any of them has.
extern "C" size_t read_bytes(int loop, const char* data, size_t size, size_t total, int threads, uint64_t* bits) {
  std::vector<uint64_t> any(threads * 8);
  std::vector<size_t> done(threads * 8);
  std::vector<std::thread> others;
  const size_t part = threads == 1 ? size : size / threads / 4096 * 4096;
  auto work = [&](int i) { done[i * 8] = loops[loop](data + i * part, part, total / threads, &any[i * 8]); };
  for (int i = 1; i < threads; ++i) others.emplace_back(work, i);
  work(0);
  for (auto& other : others) other.join();
  size_t sum = 0;
  *bits = 0;
  for (int i = 0; i < threads; ++i) sum += done[i * 8], *bits |= any[i * 8];
  return sum;
}
"""


# Bytes read by each call while the loops are compared.
_TRIAL = {"L2": 1 << 26, "DRAM": 1 << 29}


@dataclass(frozen=True)
class Reader:
    """Reads memory with the fastest loop that was found.

    Attributes:
        read: reads a given number of bytes, or a few less, and returns how many; a candidate in measurements.
        bandwidth: bytes/s, the median when the loops were compared.
        how: the loop, or torch with the reason.
    """

    read: Callable[[int], int]
    bandwidth: float
    how: str


def bandwidth(level: str = "L2", threads: int = 1) -> float:
    """Measure the bytes/s that ``threads`` cores read from ``level``, "L2" or "DRAM"; see ``reader``."""
    return reader(level, threads).bandwidth


def reader(level: str, threads: int = 1) -> Reader:
    """Return the fastest of several loops over a buffer in ``level``.

    For "L2" the buffer is a quarter of the L2 cache per thread; for "DRAM", 16 times the last-level cache, and at least
    256 MiB. Without a C++ compiler, torch's sum is used, which is slower. Raises ValueError for another level.
    """
    if level not in _TRIAL:
        raise ValueError(f"level is {level!r}; it must be one of {', '.join(_TRIAL)}")
    caches = cache_sizes()
    size = threads * caches[2] // 4 if level == "L2" else max(16 * caches[max(caches)], 1 << 28)
    try:
        library = _library()
    except native.NoCompilerError as problem:
        loops = {f"torch.sum, because {problem}": _torch_read(size, threads)}
    else:
        buffer = _Buffer(library, size)
        loops = {f"loop {i}": _native_read(library, buffer, i, threads) for i in range(library.loop_count())}
    trials = {name: partial(read, _TRIAL[level]) for name, read in loops.items()}
    timings = interleaved(trials, rounds=9, seconds=1)
    best = min(timings, key=lambda name: timings[name].median)
    return Reader(loops[best], _TRIAL[level] / timings[best].median, best)


def cache_sizes() -> dict[int, int]:
    """Return the bytes of core 0's caches by level; 1 MiB and 32 MiB if the system does not report them."""
    sizes = {2: 1 << 20, 3: 1 << 25}
    for index in Path("/sys/devices/system/cpu/cpu0/cache").glob("index*"):
        with suppress(OSError):  # Linux has no file for a number that it does not know
            level, kind, size = ((index / name).read_text().strip() for name in ("level", "type", "size"))
            if kind != "Instruction" and size.endswith("K"):
                sizes[int(level)] = int(size[:-1]) << 10
    return sizes


class _Buffer:
    """Memory on huge pages, if the system grants them, to avoid TLB misses."""

    def __init__(self, library: ctypes.CDLL, size: int) -> None:
        self.library, self.size, self.data = library, size, None  # in case a signal interrupts the next line
        self.data = library.allocate(size)
        if not self.data:
            raise MemoryError(f"{size} bytes for measuring the bandwidth could not be allocated")

    def __del__(self) -> None:
        self.library.release(self.data)


@cache
def _library() -> ctypes.CDLL:
    library = native.load("bandwidth", _SOURCE)
    library.allocate.restype = ctypes.c_void_p
    library.allocate.argtypes = [ctypes.c_size_t]
    library.release.argtypes = [ctypes.c_void_p]
    library.read_bytes.restype = ctypes.c_size_t
    library.read_bytes.argtypes = [
        ctypes.c_int, ctypes.c_void_p, ctypes.c_size_t, ctypes.c_size_t, ctypes.c_int, ctypes.POINTER(ctypes.c_uint64),
    ]  # fmt: skip
    return library


def _native_read(library: ctypes.CDLL, buffer: _Buffer, loop: int, threads: int) -> Callable[[int], int]:
    bits = ctypes.c_uint64()
    return lambda total: int(library.read_bytes(loop, buffer.data, buffer.size, total, threads, ctypes.byref(bits)))


def _torch_read(size: int, threads: int) -> Callable[[int], int]:
    data = torch.ones(size // 4)

    def read(total: int) -> int:
        before = torch.get_num_threads()
        torch.set_num_threads(threads)
        rounds, rest = divmod(total // 4, data.numel())
        for _ in range(rounds):
            data.sum()
        data[:rest].sum()
        torch.set_num_threads(before)
        return 4 * (rounds * data.numel() + rest)

    return read
