"""Schedules of the GPU's forward scan of form "serial", by Triton.

A program scans the tokens of a head in order for a tile of channels, whose state is in the L2 cache.
"""

from __future__ import annotations

from typing import ClassVar, Literal, Self

from schedules.base import KNOB_VALUES, Schedule
from schedules.gpu.address import refuse_threads
from schedules.workload import Workload

# The loop over a token's K slots is unrolled, with a row of each in registers. With more slots, compiling takes minutes
# and registers spill.
MOST_SLOTS = 16

# The most channels per thread, which are 16 bytes of float32, one load. With more channels, or with rows that are not
# aligned to this many channels, Triton may distribute loads and stores over the threads in different ways: one
# thread would then load what another one has stored, without a barrier.
ALIGNED = 4


class SerialScan(Schedule):
    """Schedule of the forward scan; the backward has no such form."""

    compiler: ClassVar[str] = "triton"

    form: Literal["serial"] = "serial"
    tile: int = 64  # channels per program
    threads: int = 64  # threads per program
    spans: int = 1  # parts of the sequence whose mass is computed in parallel

    @classmethod
    def default(cls, workload: Workload) -> Self:
        return cls(spans=_spans(workload))

    @classmethod
    def space(cls, workload: Workload) -> dict[str, KNOB_VALUES]:
        return {"tile": (8, 16, 32, 64, 128), "threads": (32, 64, 128), "spans": (1, 2, 4, 8, 16, 32)}

    def refusal(self, workload: Workload) -> str | None:
        K, D, tile, threads = workload.shape["K"], workload.shape["D"], self.tile, self.threads
        if K > MOST_SLOTS:
            return f"K is {K}; form serial supports at most {MOST_SLOTS} slots per token"
        if refused := refuse_threads(threads):
            return refused
        if self.spans < 1:
            return f"spans is {self.spans}; it must be 1 or more"
        if tile < 1 or tile & (tile - 1):
            return f"tile is {tile}; it must be a power of two"
        if tile < threads:
            return f"tile is {tile}; it must be at least threads = {threads}, so that no two threads share a channel"
        if tile > ALIGNED * threads:
            return f"tile is {tile}; it must be at most {ALIGNED} · threads = {ALIGNED * threads}"
        if tile > threads and D % ALIGNED:
            return f"tile is {tile}; it must be at most threads = {threads}, as D = {D} is not a multiple of {ALIGNED}"
        if tile > threads and tile >= 2 * D:
            return f"tile is {tile}; it must be at most threads = {threads} or less than 2 · D = {2 * D}"
        return None


def _spans(workload: Workload) -> int:
    """Return the largest power of two in 1..16 that is at most T · K / (2 · M), or 1.

    Each span loads and stores all M slots a few times, and the scan accesses T · K slots.
    """
    T, M, K = (workload.shape[axis] for axis in "TMK")
    return 1 << min(4, max(1, T * K // (2 * M)).bit_length() - 1)
