"""Knobs of the GPU scans of form "shared", by TIR, and the sizes of their programs.

A warp walks through time with a tile of channels of the state in shared memory.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Literal, Self

from schedules.base import KNOB_VALUES, Schedule
from schedules.gpu.slots import CHANNELS, HEADS, refuse_heads
from schedules.workload import Workload

BYTES = {"float64": 8, "float32": 4, "bfloat16": 2, "float16": 2}

# Threads of a program, which meet at a warp's barriers only.
THREADS = 32
# Of a program that sums tiles' shares.
SUM_THREADS = 256
# Blocks along the second axis of a grid (CUDA programming guide).
MOST_HEADS = 65535
# Of one program, on the GPU that gives most; a target may give less.
MOST_SHARED = 227 << 10
# Numbers that a thread holds in registers between their load and their chunk.
MOST_STAGED = 96
# Tokens in straight code, whose sums over lanes are exchanged together.
STRAIGHT = 8
# Bytes of the widest load; that the banks of shared memory serve at a time.
VECTOR, LINE = 16, 128
# Rows of which n make a LINE, at random places: the most that meet in the same banks, on average.
_COLLISIONS = {1: 1.0, 2: 1.5, 4: 2.13, 8: 2.63, 16: 3.08, 32: 3.53}
SLOT_LANES = (1, 2, 4, 8, 16, 32)


@dataclass(frozen=True)
class Operands:
    """Arrays by tokens that a program has in shared memory: of slots, of numbers by slot, by channel, and by both."""

    slots: int
    by_slot: int
    by_channel: int
    by_both: int = 0


FORWARD, RECOMPUTE, REVERSE = Operands(2, 2, 1), Operands(2, 1, 2), Operands(2, 5, 2, 1)


class SharedScan(Schedule):
    """Forward scan."""

    compiler: ClassVar[str] = "tir"
    threads: ClassVar[int] = THREADS
    operands: ClassVar[tuple[Operands, ...]] = (FORWARD,)  # of each kernel

    form: Literal["shared"] = "shared"
    channels: int = 4  # of a row that a thread holds
    slot_lanes: int = 1  # parts of a token's K slots that threads work on side by side
    chunk: int = 16  # tokens whose operands are held in shared memory

    @classmethod
    def default(cls, workload: Workload) -> Self:
        return cls()

    @classmethod
    def space(cls, workload: Workload) -> dict[str, KNOB_VALUES]:
        return {"channels": CHANNELS, "slot_lanes": SLOT_LANES, "chunk": (8, 16, 32)}

    def refusal(self, workload: Workload) -> str | None:
        refusals = (self._refuse_program(workload, of) for of in self.operands)
        return next((refused for refused in refusals if refused), None)

    @property
    def tile(self) -> int:
        """Channels of a program."""
        return THREADS // self.slot_lanes * self.channels

    def tiles(self, workload: Workload) -> int:
        """Programs of a head."""
        return -(-workload.shape["D"] // self.tile)

    def group(self, heads: int) -> int:
        """Of so many heads, those of a launch."""
        return heads

    def collisions(self, workload: Workload) -> float:
        """Turns that an access to a token's rows takes, over those that its bytes would."""
        return _COLLISIONS[max(1, LINE // (self.tile * word(workload)))]

    def shared_bytes(self, workload: Workload, of: Operands) -> int:
        """Rows and mass of a tile of channels, and a chunk of operands."""
        K, size = workload.shape["K"], word(workload)
        numbers = of.by_slot * K + of.by_channel * self.tile
        kept = of.by_both * K * self.tile * BYTES[history_type(workload)]
        return workload.shape["M"] * (self.tile + 1) * size + self.chunk * (of.slots * K * 4 + numbers * size + kept)

    def _refuse_program(self, workload: Workload, of: Operands) -> str | None:
        """Why a program with these operands cannot be built, in one sentence."""
        K, D, lanes, channels = workload.shape["K"], workload.shape["D"], self.slot_lanes, self.channels
        if lanes not in SLOT_LANES or K % lanes:
            return f"slot_lanes is {lanes}; it must be a power of two up to {THREADS} that divides K = {K}"
        if channels not in CHANNELS or D % channels or channels * word(workload) > VECTOR:
            return (
                f"channels is {channels}; it must be 1, 2 or 4, divide D = {D}, and be {VECTOR} bytes of sums at most"
            )
        heads = self.group(workload.shape["N"])
        if heads > MOST_HEADS:
            return f"a launch has {heads} heads; form shared takes {MOST_HEADS} at most"
        if self.chunk < 1:
            return f"chunk is {self.chunk}; it must be 1 or more"
        kept = of.by_both * K * self.tile * BYTES[history_type(workload)] // word(workload)
        numbers = (of.slots + of.by_slot) * K + of.by_channel * self.tile + kept
        staged = -(-self.chunk * numbers // THREADS)
        if staged > MOST_STAGED:
            return (
                f"a thread would hold {staged} operands of a chunk of {self.chunk} tokens; {MOST_STAGED} are the most"
            )
        return refuse_bytes(self.shared_bytes(workload, of), MOST_SHARED)


class SharedScanBackward(SharedScan):
    """Backward scan."""

    operands: ClassVar[tuple[Operands, ...]] = (RECOMPUTE, REVERSE)

    heads: int = 0  # memory against launches: heads whose rows are kept at a time; 0 for all

    @classmethod
    def space(cls, workload: Workload) -> dict[str, KNOB_VALUES]:
        return super().space(workload) | {"heads": HEADS}

    def refusal(self, workload: Workload) -> str | None:
        return refuse_heads(self.heads) or super().refusal(workload)

    def group(self, heads: int) -> int:
        return min(heads, self.heads or heads)


def word(workload: Workload) -> int:
    """Bytes of a number that sums are kept in."""
    return 8 if workload.dtype == "float64" else 4


def history_type(workload: Workload) -> str:
    """Of the rows that a backward keeps: sums, but rounded where all inputs are."""
    if workload.dtype == "bfloat16":
        return workload.dtype
    return "float64" if workload.dtype == "float64" else "float32"


def refuse_bytes(needed: int, limit: int) -> str | None:
    """A sentence where a program needs more shared memory than there is."""
    return None if needed <= limit else f"a program needs {needed} bytes of shared memory; the limit is {limit}"
