"""The scans of form "serial": which schedules they refuse, and the memory that their backward takes by default."""

from __future__ import annotations

import math
from typing import Protocol

from schedules.gpu.address import refuse_threads
from schedules.workload import Workload

# A token's slots are straight code, with a row of each in registers; with more, compiling takes minutes and spills.
MOST_SLOTS = 16

# A thread with several channels loads up to 16 bytes at once. Where some rows start at odd places, or a thread has more
# than this many channels, loads and stores would be split between the threads in different ways, and one thread's
# channels would be another's elsewhere.
ALIGNED = 4


class Knobs(Protocol):
    """What the forward and the backward schedule share."""

    @property
    def tile(self) -> int: ...
    @property
    def threads(self) -> int: ...
    @property
    def spans(self) -> int: ...


def refuse(workload: Workload, knobs: Knobs) -> str | None:
    """Why the rows' kernel cannot be built, in one sentence; a channel of a tile must be one thread's alone."""
    refused = refuse_top_k(workload) or refuse_threads(knobs.threads)
    if refused:
        return refused
    D, tile, threads = workload.shape["D"], knobs.tile, knobs.threads
    if knobs.spans < 1:
        return f"spans is {knobs.spans}; it must be 1 or more"
    if tile < 1 or tile & (tile - 1):
        return f"tile is {tile}; it must be a power of two"
    if tile < threads:
        return f"tile is {tile}, fewer channels than the {threads} threads; a channel must be one thread's alone"
    if tile > ALIGNED * threads:
        return f"tile is {tile}; a thread has {ALIGNED} channels at most, so that {threads} have {ALIGNED * threads}"
    if tile > threads and D % ALIGNED:
        return f"tile is {tile}, more channels than the {threads} threads; D = {D} is no multiple of {ALIGNED} for that"
    if tile > threads and tile >= 2 * D:
        return f"tile is {tile}; half of it holds all D = {D} channels"
    return None


def refuse_top_k(workload: Workload) -> str | None:
    """A sentence where a token has too many slots."""
    K = workload.shape["K"]
    return f"K is {K}; form serial walks at most {MOST_SLOTS} slots a token" if K > MOST_SLOTS else None


def checkpoint(workload: Workload) -> int:
    """Tokens between copies of the state, a power of two, so that copies and kept rows take least memory.

    T/c copies of M rows and c tokens' K replaced rows are fewest at c = √(T · M / K).
    """
    T, M, K = (workload.shape[axis] for axis in "TMK")
    return 1 << max(4, round(math.log2(max(T * M / K, 1)) / 2))


def spans(workload: Workload) -> int:
    """Spans whose mass is walked side by side: as many, up to 16, as cost no more than half of the walk in M numbers.

    Each span reads and writes all M slots a few times, where the walk takes T · K steps.
    """
    T, M, K = (workload.shape[axis] for axis in "TMK")
    return 1 << min(4, max(1, T * K // (2 * M)).bit_length() - 1)
