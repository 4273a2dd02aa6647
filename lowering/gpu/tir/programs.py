"""The templates whose programs are bound to GPU threads: which op has which, their launches, and the work of each."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from lowering.gpu.resources import Work
from schedules.gpu import shared
from schedules.gpu.shared import BYTES, SUM_THREADS, THREADS, word
from schedules.workload import Workload


@dataclass(frozen=True)
class Program:
    """One launch: the function of that name in the template's module.

    ``grid``: along each axis a number of blocks, or a run-time size by name and how much of it a block takes.
    """

    name: str
    grid: Sequence[int | tuple[str, int]]
    threads: int
    work: Work


def template(workload: Workload, schedule: Any, cuda: bool, state: str = "float32", backwards: bool = False) -> Any:
    """The IRModule of an op's kernels for a GPU, or of the same programs as loops on the CPU.

    ``state`` is the type of memory and mass. ``backwards``: the CPU's loops over threads go from the last to the first.
    ValueError for an op that has none.
    """
    from lowering.gpu.address_decode import tir as address_threads
    from lowering.gpu.decode_heads import tir as heads_threads
    from lowering.gpu.memory_scan.shared import backward as shared_scan_backward
    from lowering.gpu.memory_scan.shared import forward as shared_scan
    from lowering.gpu.memory_step import tir as step_threads

    if workload.op == "address_decode":
        return address_threads.decode(workload, schedule, cuda, backwards)
    if workload.op == "address_decode_backward":
        return address_threads.differentiate_rows(workload, schedule, cuda, backwards)
    others = {
        "memory_scan": shared_scan, "memory_scan_backward": shared_scan_backward, "memory_step": step_threads,
        "decode_heads": heads_threads,
    }  # fmt: skip
    if workload.op not in others:
        raise ValueError(f"{workload.op} has no TIR kernel for a GPU")
    return others[workload.op].module(workload, schedule, cuda, state, backwards)


def programs(workload: Workload, schedule: Any) -> tuple[Program, ...]:
    """The launches of an op, in order; ValueError for an op that has no template."""
    count = {
        "address_decode": _rows,
        "address_decode_backward": _rows,
        "memory_scan": _scan,
        "memory_scan_backward": _scan_backward,
        "memory_step": _step,
        "decode_heads": _heads,
    }
    if workload.op not in count:
        raise ValueError(f"{workload.op} has no TIR kernel for a GPU")
    return count[workload.op](workload, schedule)


def _rows(workload: Workload, schedule: Any) -> tuple[Program, ...]:
    R, U, P, K = (workload.shape[axis] for axis in "RUPK")
    size = BYTES[workload.dtype]
    logits, addresses = R * U * P * size, R * K * (4 + size)
    if workload.op == "address_decode":
        moved, each = logits + addresses, U * P * (K * K.bit_length() + K)
    else:
        moved, each = 2 * logits + addresses + R * K * size, U * P * (3 * K + 12)
    work = Work(-(-R // schedule.threads), schedule.threads, moved, moved, float(R * each))
    return (Program(workload.op, (("rows", schedule.threads),), schedule.threads, work),)


def _scan(workload: Workload, schedule: Any) -> tuple[Program, ...]:
    return (_walk("memory_scan", workload, schedule, heads=workload.shape["N"]),)


def _scan_backward(workload: Workload, schedule: Any) -> tuple[Program, ...]:
    N = workload.shape["N"]
    group = min(N, schedule.heads or N)
    made: list[Program] = []
    for first in range(0, N, group):
        heads = min(group, N - first)
        made += [
            _walk("forth", workload, schedule, heads),
            _sum("reads", workload, schedule, heads),
            _walk("back", workload, schedule, heads),
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
    "forth": _Walked(shared.FORTH, 1, 0, True, 3, (4, 5, 0)),
    "back": _Walked(shared.BACK, 1, 1, True, 4, (6, 6, 3)),
}


def _walk(name: str, workload: Workload, schedule: Any, heads: int) -> Program:
    T, K, M, D = (workload.shape[axis] for axis in "TKMD")
    walk, size, sums = _WALKS[name], BYTES[workload.dtype], word(workload)
    of, tile, count = walk.operands, shared.tile(schedule), shared.tiles(workload, schedule)
    programs, width = heads * count, K // schedule.slot_lanes
    by_slot = K * (of.slots * 4 + of.by_slot * size + walk.by_slot * sums)
    by_channel = D * (of.by_channel + walk.by_channel) * size
    kept = K * D * BYTES[shared.history_type(workload)] if walk.kept else 0
    state = 2 * heads * M * (D + 1) * sums
    moved = heads * T * (by_slot + by_channel + kept) + state
    again = heads * T * (by_slot * count + by_channel + kept) + state
    # A warp's access takes a turn for each LINE bytes, and more where narrow rows meet in banks.
    rows = walk.rows * K * tile * sums * shared.collisions(workload, schedule)
    turns = of.slots + of.by_slot + of.by_channel + 3
    of_row, of_slot, of_channel = walk.steps
    steps = width * (schedule.channels * of_row + of_slot) + schedule.channels * of_channel
    work = Work(
        programs, THREADS, moved, again, float(programs * T * THREADS * steps), steps=T, trips=0, shared_trips=2,
        shared_bytes=float(programs * T * (rows + turns * shared.LINE)),
    )  # fmt: skip
    # A head's tiles run side by side, so that they find its addresses in the L2 cache.
    return Program(name, (count, ("N", 1)), THREADS, work)


def _sum(name: str, workload: Workload, schedule: Any, heads: int) -> Program:
    T, K = workload.shape["T"], workload.shape["K"]
    size, sums, count = BYTES[workload.dtype], word(workload), shared.tiles(workload, schedule)
    moved = heads * T * K * (count * sums + size + (2 * sums + size if name == "reads" else 0))
    work = Work(heads, SUM_THREADS, moved, moved, float(heads * T * K * (count + 4)), steps=-(-T * K // SUM_THREADS))
    return Program(name, (("N", 1),), SUM_THREADS, work)


def _step(workload: Workload, schedule: Any) -> tuple[Program, ...]:
    N, K, D = (workload.shape[axis] for axis in "NKD")
    size, sums = BYTES[workload.dtype], word(workload)
    operands, values = 2 * N * K * (4 + size), 2 * N * D * size
    moved = operands + values + 3 * N * K * (D + 1) * sums
    work = Work(N, schedule.threads, moved, moved, 5.0 * N * K * D, steps=1, trips=5, shared_trips=2, barriers=2)
    return (Program("memory_step", (("N", 1),), schedule.threads, work),)


def _heads(workload: Workload, schedule: Any) -> tuple[Program, ...]:
    N, U, P, K, D = (workload.shape[axis] for axis in "NUPKD")
    size, sums = BYTES[workload.dtype], word(workload)
    moved = N * (2 * U * P + 2 * D) * size + 3 * N * K * (D + 1) * sums
    # Two threads of a program decode, one after another's logits; then come mass and rows as in a step.
    operations = N * (2.0 * U * P * (K * K.bit_length() + K) + 5.0 * K * D)
    work = Work(N, schedule.threads, moved, moved, operations, steps=1, trips=5, shared_trips=2 + U, barriers=5)
    return (Program("decode_heads", (("B", 1), ("H", 1)), schedule.threads, work),)
