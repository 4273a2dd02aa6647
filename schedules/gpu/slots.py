"""Knobs of the GPU scans of form "slots", by Triton.

Accesses are sorted by slot and time, and slots are scanned side by side (the paper's way).
"""

from __future__ import annotations

from typing import ClassVar, Literal, Self

from schedules.base import KNOB_VALUES, Schedule
from schedules.gpu.address import refuse_threads
from schedules.workload import Workload

# Accesses whose loads are under way together in a program.
BATCH = 8
# More channels would be loads of more than 16 bytes in float32.
CHANNELS = (1, 2, 4)
# Worth trying, of heads whose rows are kept at a time; 0 for all.
HEADS = (0, 16, 64)
_MOST_ACCESSES = 2**31 - 2**16  # of a head: int32 numbers them


class SlotsScan(Schedule):
    """Forward scan, and backward."""

    compiler: ClassVar[str] = "triton"

    form: Literal["slots"] = "slots"
    threads: int = 64  # of a program
    piece: int = 64  # accesses in sorted order that a program walks through
    channels: int = 4  # of a row that a thread holds
    heads: int = 0  # memory against launches: heads whose rows are kept at a time; 0 for all

    @classmethod
    def default(cls, workload: Workload) -> Self:
        """The fewest threads from 64 up that hold a row of the state."""
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
            return f"a head's rows have {numbers} numbers, of M·D or T·K·D; form slots numbers at most {2**31 - 1}"
        if self.threads * channels < dim:
            return f"threads · channels is {self.threads * channels}; a program holds a row, of D = {dim}, at least"
        return refuse_threads(self.threads)


def refuse_heads(held: int) -> str | None:
    """A sentence where the heads whose rows are kept at a time cannot be so many."""
    return None if held >= 0 else f"heads is {held}; it must be 0, for all, or how many heads' rows are kept at a time"
