"""Schedules of the GPU scans of form "shared", by TIR, and the sizes of their programs.

A warp scans the tokens of a head in order with a tile of channels of the state in shared memory.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import ClassVar, Literal, Self

from schedules.base import KNOB_VALUES, Schedule, largest_divisor
from schedules.gpu.slots import CHANNELS, HEADS, refuse_heads
from schedules.workload import Workload

BYTES = {"float64": 8, "float32": 4, "bfloat16": 2, "float16": 2}

# Threads per program: one warp, so that warp barriers suffice.
THREADS = 32
# Threads per program that sums the partial sums of tiles.
SUM_THREADS = 256
# The most blocks along the second axis of a grid (CUDA programming guide).
MOST_HEADS = 65535
# The most bytes of shared memory per block, on the GPUs that have most; a target may have less.
MOST_SHARED = 227 << 10
# The most operands of the next chunk that a thread holds in registers before it stores them to shared memory.
MOST_STAGED = 96
# The most tokens of an unrolled group, whose sums over lanes are exchanged together.
STRAIGHT = 8
# Bytes of the widest load, and bytes that the banks of shared memory deliver per cycle.
VECTOR, LINE = 16, 128
# Bank-conflict factor for n rows per LINE bytes at random places: the expected number of rows in the busiest banks.
_COLLISIONS = {1: 1.0, 2: 1.5, 4: 2.13, 8: 2.63, 16: 3.08, 32: 3.53}
SLOT_LANES = (1, 2, 4, 8, 16, 32)


@dataclass(frozen=True)
class Operands:
    """The numbers of per-token arrays in a program's shared memory.

    Attributes:
        slots: arrays of K slots.
        by_slot: arrays of K numbers.
        by_channel: arrays of a number per channel.
        by_both: arrays of a number per slot and channel.
    """

    slots: int
    by_slot: int
    by_channel: int
    by_both: int = 0


FORWARD, RECOMPUTE, REVERSE = Operands(2, 2, 1), Operands(2, 1, 2), Operands(2, 5, 2, 1)


class SharedScan(Schedule):
    """Schedule of the forward scan."""

    compiler: ClassVar[str] = "tir"
    threads: ClassVar[int] = THREADS
    operands: ClassVar[tuple[Operands, ...]] = (FORWARD,)  # of each kernel that scans

    form: Literal["shared"] = "shared"
    channels: int = 4  # channels of a row per thread
    slot_lanes: int = 1  # threads that share a token's K slots
    chunk: int = 16  # tokens whose operands are in shared memory

    @classmethod
    def default(cls, workload: Workload) -> Self:
        """Return programs of 16 channels, or as near to that as is valid, with as many lanes for slots as possible.

        At M = 1024, that is the fastest on an H100 and an H200: three programs fit on a processor.
        """
        every = (cls(channels=channels, slot_lanes=lanes, chunk=8) for channels in CHANNELS for lanes in SLOT_LANES)
        valid = [schedule for schedule in every if schedule.refusal(workload) is None]
        return min(valid, key=lambda s: (abs(math.log2(s.tile / 16)), -s.slot_lanes), default=cls())

    @classmethod
    def space(cls, workload: Workload) -> dict[str, KNOB_VALUES]:
        return {"channels": CHANNELS, "slot_lanes": SLOT_LANES, "chunk": (8, 16, 32)}

    def refusal(self, workload: Workload) -> str | None:
        refusals = (self._refuse_program(workload, of) for of in self.operands)
        return next((refused for refused in refusals if refused), None)

    @property
    def tile(self) -> int:
        """The number of channels per program."""
        return THREADS // self.slot_lanes * self.channels

    @property
    def straight(self) -> int:
        """The number of tokens whose code is unrolled."""
        return largest_divisor(self.chunk, STRAIGHT)

    def tiles(self, workload: Workload) -> int:
        """Return the number of programs per head."""
        return -(-workload.shape["D"] // self.tile)

    def group(self, heads: int) -> int:
        """Return the number of heads per launch, of ``heads``."""
        return heads

    def collisions(self, workload: Workload) -> float:
        """Return the bank-conflict factor of an access to a token's rows."""
        return _COLLISIONS[max(1, LINE // (self.tile * word(workload)))]

    def shared_bytes(self, workload: Workload, of: Operands) -> int:
        """Return the bytes of shared memory per program: a tile's rows and masses, and a chunk of operands."""
        K, size = workload.shape["K"], word(workload)
        numbers = of.by_slot * K + of.by_channel * self.tile
        kept = of.by_both * K * self.tile * BYTES[history_type(workload)]
        return workload.shape["M"] * (self.tile + 1) * size + self.chunk * (of.slots * K * 4 + numbers * size + kept)

    def _refuse_program(self, workload: Workload, of: Operands) -> str | None:
        """Return a sentence if a program with these operands cannot be built."""
        K, D, lanes, channels = workload.shape["K"], workload.shape["D"], self.slot_lanes, self.channels
        if lanes not in SLOT_LANES or K % lanes:
            return f"slot_lanes is {lanes}; it must be a power of two up to {THREADS} that divides K = {K}"
        if channels not in CHANNELS or D % channels or channels * word(workload) > VECTOR:
            return (
                f"channels is {channels}; it must be 1, 2 or 4, divide D = {D}, and be at most {VECTOR} bytes of sums"
            )
        heads = self.group(workload.shape["N"])
        if heads > MOST_HEADS:
            return f"a launch has {heads} heads; form shared supports at most {MOST_HEADS}"
        if self.chunk < 1:
            return f"chunk is {self.chunk}; it must be 1 or more"
        kept = of.by_both * K * self.tile * BYTES[history_type(workload)] // word(workload)
        numbers = (of.slots + of.by_slot) * K + of.by_channel * self.tile + kept
        staged = -(-self.chunk * numbers // THREADS)
        if staged > MOST_STAGED:
            return f"chunk is {self.chunk}; a thread would hold {staged} of its operands; at most {MOST_STAGED} fit"
        return refuse_bytes(self.shared_bytes(workload, of), MOST_SHARED)


class SharedScanBackward(SharedScan):
    """Schedule of the backward."""

    operands: ClassVar[tuple[Operands, ...]] = (RECOMPUTE, REVERSE)

    heads: int = 0  # heads per launch, which limits the memory for saved rows; 0 for all

    @classmethod
    def space(cls, workload: Workload) -> dict[str, KNOB_VALUES]:
        return super().space(workload) | {"heads": HEADS}

    def refusal(self, workload: Workload) -> str | None:
        return refuse_heads(self.heads) or super().refusal(workload)

    def group(self, heads: int) -> int:
        return min(heads, self.heads or heads)


def word(workload: Workload) -> int:
    """Return the bytes of an element of the dtype of sums."""
    return 8 if workload.dtype == "float64" else 4


def history_type(workload: Workload) -> str:
    """Return the dtype of the rows that the backward saves: bfloat16 if the workload is, else the dtype of sums."""
    if workload.dtype == "bfloat16":
        return workload.dtype
    return "float64" if workload.dtype == "float64" else "float32"


def refuse_bytes(needed: int, limit: int) -> str | None:
    """Return a sentence if a program needs more than ``limit`` bytes of shared memory."""
    return None if needed <= limit else f"a program needs {needed} bytes of shared memory; the limit is {limit}"
