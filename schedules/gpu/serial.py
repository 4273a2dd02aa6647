"""Knobs of the GPU scans of form "serial", by Triton.

A program owns a head's tile of channels and walks through time, its state in the L2 cache.
"""

from __future__ import annotations

import math
from typing import ClassVar, Literal, Self

from schedules.base import KNOB_VALUES, Schedule
from schedules.gpu.address import refuse_threads
from schedules.workload import Workload

# A token's slots are straight code, with a row of each in registers; with more, compiling takes minutes and spills.
MOST_SLOTS = 16

# A thread with several channels loads up to 16 bytes at once. Where some rows start at odd places, or a thread has more
# than this many channels, loads and stores would be split between the threads in different ways, and one thread's
# channels would be another's elsewhere.
ALIGNED = 4


class SerialScan(Schedule):
    """Forward scan."""

    compiler: ClassVar[str] = "triton"

    form: Literal["serial"] = "serial"
    tile: int = 64  # channels a program
    threads: int = 64  # of a program
    spans: int = 1  # parts of the sequence whose mass is walked side by side

    @classmethod
    def default(cls, workload: Workload) -> Self:
        return cls(spans=_spans(workload))

    @classmethod
    def space(cls, workload: Workload) -> dict[str, KNOB_VALUES]:
        return {"tile": (8, 16, 32, 64, 128), "threads": (32, 64, 128), "spans": (1, 2, 4, 8, 16, 32)}

    def refusal(self, workload: Workload) -> str | None:
        """A channel of a tile must be one thread's alone."""
        K, D, tile, threads = workload.shape["K"], workload.shape["D"], self.tile, self.threads
        if K > MOST_SLOTS:
            return f"K is {K}; form serial walks at most {MOST_SLOTS} slots a token"
        if refused := refuse_threads(threads):
            return refused
        if self.spans < 1:
            return f"spans is {self.spans}; it must be 1 or more"
        if tile < 1 or tile & (tile - 1):
            return f"tile is {tile}; it must be a power of two"
        if tile < threads:
            return f"tile is {tile}, fewer channels than the {threads} threads; a channel must be one thread's alone"
        if tile > ALIGNED * threads:
            return (
                f"tile is {tile}; a thread has {ALIGNED} channels at most, so that {threads} have {ALIGNED * threads}"
            )
        if tile > threads and D % ALIGNED:
            many = f"tile is {tile}, more channels than the {threads} threads"
            return f"{many}; D = {D} is no multiple of {ALIGNED} for that"
        if tile > threads and tile >= 2 * D:
            return f"tile is {tile}; half of it holds all D = {D} channels"
        return None


class SerialScanBackward(SerialScan):
    """Backward scan."""

    # Memory against work: tokens between two copies of the state that the backward starts anew from.
    checkpoint: int = 256

    @classmethod
    def default(cls, workload: Workload) -> Self:
        return cls(spans=_spans(workload), checkpoint=_checkpoint(workload))

    @classmethod
    def space(cls, workload: Workload) -> dict[str, KNOB_VALUES]:
        checkpoints = tuple(sorted({64, 256, 1024, 4096, _checkpoint(workload)}))
        return super().space(workload) | {"checkpoint": checkpoints}

    def refusal(self, workload: Workload) -> str | None:
        if self.checkpoint < 1:
            return f"checkpoint is {self.checkpoint}; it must be 1 or more"
        return super().refusal(workload)


def _checkpoint(workload: Workload) -> int:
    """Tokens between copies of the state, a power of two, so that copies and kept rows take least memory.

    T/c copies of M rows and c tokens' K replaced rows are fewest at c = √(T · M / K).
    """
    T, M, K = (workload.shape[axis] for axis in "TMK")
    return 1 << max(4, round(math.log2(max(T * M / K, 1)) / 2))


def _spans(workload: Workload) -> int:
    """Spans whose mass is walked side by side: as many, up to 16, as cost no more than half of the walk in M numbers.

    Each span reads and writes all M slots a few times, where the walk takes T · K steps.
    """
    T, M, K = (workload.shape[axis] for axis in "TMK")
    return 1 << min(4, max(1, T * K // (2 * M)).bit_length() - 1)
