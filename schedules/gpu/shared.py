"""The scans of form "shared": the sizes of their programs, and the rules that refuse some schedules."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

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
CHUNKS = (8, 16, 32)


class Knobs(Protocol):
    """What the forward and the backward schedule share."""

    @property
    def slot_lanes(self) -> int: ...
    @property
    def channels(self) -> int: ...
    @property
    def chunk(self) -> int: ...
    @property
    def heads(self) -> int: ...


def tile(knobs: Knobs) -> int:
    """Channels of a program."""
    return THREADS // knobs.slot_lanes * knobs.channels


def tiles(workload: Workload, knobs: Knobs) -> int:
    """Programs of a head."""
    return -(-workload.shape["D"] // tile(knobs))


def collisions(workload: Workload, knobs: Knobs) -> float:
    """Turns that an access to a token's rows takes, over those that its bytes would."""
    return _COLLISIONS[max(1, LINE // (tile(knobs) * word(workload)))]


def word(workload: Workload) -> int:
    """Bytes of a number that sums are kept in."""
    return 8 if workload.dtype == "float64" else 4


def history_type(workload: Workload) -> str:
    """Of the rows that a backward keeps: sums, but rounded where all inputs are."""
    if workload.dtype == "bfloat16":
        return workload.dtype
    return "float64" if workload.dtype == "float64" else "float32"


@dataclass(frozen=True)
class Operands:
    """Arrays by tokens that a program has in shared memory: of slots, of numbers by slot, by channel, and by both."""

    slots: int
    by_slot: int
    by_channel: int
    by_both: int = 0


FORWARD, RECOMPUTE, REVERSE = Operands(2, 2, 1), Operands(2, 1, 2), Operands(2, 5, 2, 1)


def shared_bytes(workload: Workload, knobs: Knobs, of: Operands) -> int:
    """Rows and mass of a tile of channels, and a chunk of operands."""
    K, size, width = workload.shape["K"], word(workload), tile(knobs)
    numbers = of.by_slot * K + of.by_channel * width
    kept = of.by_both * K * width * BYTES[history_type(workload)]
    return workload.shape["M"] * (width + 1) * size + knobs.chunk * (of.slots * K * 4 + numbers * size + kept)


def refuse(workload: Workload, knobs: Knobs, of: Operands) -> str | None:
    """Why a program cannot be built, in one sentence."""
    K, D, lanes, channels = workload.shape["K"], workload.shape["D"], knobs.slot_lanes, knobs.channels
    if lanes not in SLOT_LANES or K % lanes:
        return f"slot_lanes is {lanes}; it must be a power of two up to {THREADS} that divides K = {K}"
    if channels not in (1, 2, 4) or D % channels or channels * word(workload) > VECTOR:
        return f"channels is {channels}; it must be 1, 2 or 4, divide D = {D}, and be {VECTOR} bytes of sums at most"
    heads = min(workload.shape["N"], knobs.heads or workload.shape["N"])
    if heads > MOST_HEADS:
        return f"a launch has {heads} heads; form shared takes {MOST_HEADS} at most"
    if knobs.chunk < 1:
        return f"chunk is {knobs.chunk}; it must be 1 or more"
    width = tile(knobs)
    kept = of.by_both * K * width * BYTES[history_type(workload)] // word(workload)
    numbers = (of.slots + of.by_slot) * K + of.by_channel * width + kept
    staged = -(-knobs.chunk * numbers // THREADS)
    if staged > MOST_STAGED:
        return f"a thread would hold {staged} operands of a chunk of {knobs.chunk} tokens; {MOST_STAGED} are the most"
    return refuse_bytes(shared_bytes(workload, knobs, of), MOST_SHARED)


def refuse_bytes(needed: int, limit: int) -> str | None:
    """A sentence where a program needs more shared memory than there is."""
    return None if needed <= limit else f"a program needs {needed} bytes of shared memory; the limit is {limit}"
