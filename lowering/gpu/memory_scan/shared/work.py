"""The launches of the scans of form "shared", and what each of them does."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from lowering.gpu.plan import Program
from lowering.gpu.resources import Work
from schedules.gpu import shared
from schedules.gpu.shared import BYTES, SUM_THREADS, THREADS, word
from schedules.workload import Workload


def programs(workload: Workload, schedule: Any) -> tuple[Program, ...]:
    """The forward's."""
    return (_walk("memory_scan", workload, schedule, heads=workload.shape["N"]),)


def programs_backward(workload: Workload, schedule: Any) -> tuple[Program, ...]:
    """The backward's, a group of heads after another."""
    N = workload.shape["N"]
    group = schedule.group(N)
    made: list[Program] = []
    for first in range(0, N, group):
        heads = min(group, N - first)
        made += [
            _walk("recompute", workload, schedule, heads),
            _sum("reads", workload, schedule, heads),
            _walk("reverse", workload, schedule, heads),
            _sum("writes", workload, schedule, heads),
        ]
    return tuple(made)


@dataclass(frozen=True)
class _Walked:
    """What a walk does with a token.

    Attributes:
        operands: that it reads. by_slot, by_channel: arrays that it writes; kept: are rows kept, or read.
        rows: times that a slot's row goes to or from shared memory.
        steps: arithmetic of a thread, for each of its channels in each slot, each slot, each channel.
    """

    operands: shared.Operands
    by_slot: int
    by_channel: int
    kept: bool
    rows: int
    steps: tuple[int, int, int]


_WALKS = {
    "memory_scan": _Walked(shared.FORWARD, 0, 1, False, 3, (3, 5, 3)),
    "recompute": _Walked(shared.RECOMPUTE, 1, 0, True, 3, (4, 5, 0)),
    "reverse": _Walked(shared.REVERSE, 1, 1, True, 4, (6, 6, 3)),
}


def _walk(name: str, workload: Workload, schedule: Any, heads: int) -> Program:
    T, K, M, D = (workload.shape[axis] for axis in "TKMD")
    walk, size, sums = _WALKS[name], BYTES[workload.dtype], word(workload)
    of, tile, count = walk.operands, schedule.tile, schedule.tiles(workload)
    programs, width = heads * count, K // schedule.slot_lanes
    by_slot = K * (of.slots * 4 + of.by_slot * size + walk.by_slot * sums)
    by_channel = D * (of.by_channel + walk.by_channel) * size
    kept = K * D * BYTES[shared.history_type(workload)] if walk.kept else 0
    state = 2 * heads * M * (D + 1) * sums
    moved = heads * T * (by_slot + by_channel + kept) + state
    again = heads * T * (by_slot * count + by_channel + kept) + state
    # A warp's access to shared memory takes one cycle for each LINE bytes, and more where narrow rows share banks.
    rows = walk.rows * K * tile * sums * schedule.collisions(workload)
    turns = of.slots + of.by_slot + of.by_channel + 3
    of_row, of_slot, of_channel = walk.steps
    steps = width * (schedule.channels * of_row + of_slot) + schedule.channels * of_channel
    work = Work(
        programs, THREADS, moved, again, float(programs * T * THREADS * steps), steps=T, trips=0, shared_trips=2,
        shared_bytes=float(programs * T * (rows + turns * shared.LINE)),
    )  # fmt: skip
    # The tiles of a head run at the same time, so that its addresses are read from DRAM once and then from L2.
    return Program(name, (count, ("N", 1)), THREADS, work)


def _sum(name: str, workload: Workload, schedule: Any, heads: int) -> Program:
    T, K = workload.shape["T"], workload.shape["K"]
    size, sums, count = BYTES[workload.dtype], word(workload), schedule.tiles(workload)
    moved = heads * T * K * (count * sums + size + (2 * sums + size if name == "reads" else 0))
    work = Work(heads, SUM_THREADS, moved, moved, float(heads * T * K * (count + 4)), steps=-(-T * K // SUM_THREADS))
    return Program(name, (("N", 1),), SUM_THREADS, work)
