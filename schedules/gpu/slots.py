"""Schedule of the GPU scans of form "slots", by Triton.

Accesses are sorted by slot and time, and slots are scanned in parallel (the paper's algorithm).
"""

from __future__ import annotations

from typing import ClassVar, Literal, Self

from schedules.base import KNOB_VALUES, Schedule
from schedules.gpu.address import refuse_threads
from schedules.workload import Workload

# Accesses that a program loads together, so that their latencies overlap.
BATCH = 8
# Channels per thread. More than 4 in float32 exceed the 16 bytes of one load.
CHANNELS = (1, 2, 4)
# Values of the knob ``heads`` for tuning.
HEADS = (0, 16, 64)
_MOST_ACCESSES = 2**31 - 2**16  # per head; kernels number them, and their padding, in int32


class SlotsScan(Schedule):
    """Schedule of the forward scan and of the backward."""

    compiler: ClassVar[str] = "triton"

    form: Literal["slots"] = "slots"
    threads: int = 64  # threads per program
    piece: int = 64  # sorted accesses per piece, which are scanned in order
    channels: int = 4  # channels of a row per thread
    heads: int = 0  # heads per group of launches, which limits the scratch; 0 for all

    @classmethod
    def default(cls, workload: Workload) -> Self:
        """Return a schedule with the fewest threads, at least 64, that hold a row of the state."""
        each = -(-workload.shape["D"] // cls().channels)
        return cls(threads=max(64, 1 << (each - 1).bit_length()))

    @classmethod
    def space(cls, workload: Workload) -> dict[str, KNOB_VALUES]:
        return {"threads": (32, 64, 128), "piece": (32, 64, 128, 256), "channels": CHANNELS, "heads": HEADS}

    def refusal(self, workload: Workload) -> str | None:
        piece, channels, dim = self.piece, self.channels, workload.shape["D"]
        accesses = 2 * workload.shape["T"] * workload.shape["K"]
        if not BATCH <= piece <= 2**15 or piece % BATCH:
            return f"piece is {piece}; it must be a multiple of {BATCH} in {BATCH}..{2**15}"
        if channels not in CHANNELS:
            return f"channels is {channels}; it must be 1, 2 or 4"
        if refused := refuse_heads(self.heads):
            return refused
        if accesses > _MOST_ACCESSES:
            return f"a head has 2·T·K = {accesses} accesses; form slots sorts at most {_MOST_ACCESSES}"
        numbers = dim * max(accesses // 2, workload.shape["M"])
        if numbers >= 2**31:
            return f"max(M, T·K)·D is {numbers}; form slots supports at most {2**31 - 1}"
        if self.threads * channels < dim:
            return f"threads · channels is {self.threads * channels}; it must be at least D = {dim}"
        return refuse_threads(self.threads)


def refuse_heads(held: int) -> str | None:
    """Return a sentence if ``held`` is not a valid number of heads per group."""
    return None if held >= 0 else f"heads is {held}; it must be 0, for all heads, or the number of heads per group"
