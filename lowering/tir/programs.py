"""The templates whose programs are bound to GPU threads: which op has which, their launches, and the work of each."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from lowering.tir.threads import WARP
from lowering.work import Work
from schedules.gpu.shared import word
from schedules.workload import Workload

_BYTES = {"float64": 8, "float32": 4, "bfloat16": 2, "float16": 2}


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
    from lowering.tir import address_threads, heads_threads, shared_scan, shared_scan_backward, step_threads

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
    size = _BYTES[workload.dtype]
    logits, addresses = R * U * P * size, R * K * (4 + size)
    if workload.op == "address_decode":
        moved, each = logits + addresses, U * P * (K * K.bit_length() + K)
    else:
        moved, each = 2 * logits + addresses + R * K * size, U * P * (3 * K + 12)
    work = Work(-(-R // schedule.threads), schedule.threads, moved, moved, float(R * each))
    return (Program(workload.op, (("rows", schedule.threads),), schedule.threads, work),)


def _scan(workload: Workload, schedule: Any) -> tuple[Program, ...]:
    N, T, K, M, D = (workload.shape[axis] for axis in "NTKMD")
    size, sums, tile, lanes = _BYTES[workload.dtype], word(workload), schedule.tile, schedule.slot_lanes
    tiles, threads = -(-D // tile), tile * lanes
    operands, rows, state = 2 * N * T * K * (4 + size), 2 * N * T * D * size, 2 * N * M * (D + 1) * sums
    # A row is read, written and read again; every warp reads its operands; the mass is every tile's own.
    warps = -(-threads // WARP)
    shared = N * tiles * T * (3 * K * threads // lanes * sums + warps * K * (8 + 3 * sums) + 6 * K * sums)
    work = Work(
        N * tiles, threads, operands + rows + state, operands * tiles + rows + state,
        float(N * T * tiles * (K * tile * 5 + K * 12)), steps=T, trips=0, shared_trips=4,
        barriers=0 if threads <= WARP or (lanes == 1 and K <= WARP) else 2, shared_bytes=shared,
    )  # fmt: skip
    return (Program("memory_scan", (("N", 1), tiles), threads, work),)


def _scan_backward(workload: Workload, schedule: Any) -> tuple[Program, ...]:
    N, T, K, M, D = (workload.shape[axis] for axis in "NTKMD")
    size, sums, tile, lanes = _BYTES[workload.dtype], word(workload), schedule.tile, schedule.slot_lanes
    tiles, threads = -(-D // tile), tile * lanes
    segments = -(-T // schedule.checkpoint)
    addresses, kept = N * T * K * (4 + size), 2 * N * T * K * sums
    mass = addresses + N * T * K * 4 + N * M * sums + kept
    # Tokens before the last segment are walked forward twice, each once back.
    walked = T + max(T - schedule.checkpoint, 0)
    rows = 3 * N * T * D * size
    state = 3 * N * M * D * sums
    scratch = 2 * N * T * K * D * sums + 2 * segments * N * M * D * sums
    parts = 2 * N * tiles * T * K * sums
    again = tiles * (walked * N * K * (4 + size) + 2 * addresses + N * T * K * sums)
    lane_barriers = 2 if lanes > 1 and threads > WARP else 0
    back = Work(
        N * tiles, threads, 2 * addresses + kept // 2 + rows + state + scratch + parts,
        again + rows + state + scratch + parts, float(N * D * K * (3 * walked + 14 * T)), steps=walked + T,
        trips=0, shared_trips=4, barriers=lane_barriers,
        shared_bytes=float(N * tiles * K * tile * sums * (2 * walked + 12 * T)),
    )  # fmt: skip
    weights = 2 * addresses + kept + parts + 2 * N * T * K * size + 2 * N * M * sums
    chain = {"steps": T, "trips": 0, "shared_trips": 4, "shared_bytes": 8.0 * N * T * K * sums}
    return (
        Program("mass", (("N", 1),), WARP, Work(N, WARP, mass, mass, 6.0 * N * T * K, **chain)),
        Program("state", (("N", 1), tiles), threads, back),
        Program("weights", (("N", 1),), WARP, Work(N, WARP, weights, weights, 12.0 * N * T * K, **chain)),
    )


def _step(workload: Workload, schedule: Any) -> tuple[Program, ...]:
    N, K, D = (workload.shape[axis] for axis in "NKD")
    size, sums = _BYTES[workload.dtype], word(workload)
    operands, values = 2 * N * K * (4 + size), 2 * N * D * size
    moved = operands + values + 3 * N * K * (D + 1) * sums
    work = Work(N, schedule.threads, moved, moved, 5.0 * N * K * D, steps=1, trips=5, shared_trips=2, barriers=2)
    return (Program("memory_step", (("N", 1),), schedule.threads, work),)


def _heads(workload: Workload, schedule: Any) -> tuple[Program, ...]:
    N, U, P, K, D = (workload.shape[axis] for axis in "NUPKD")
    size, sums = _BYTES[workload.dtype], word(workload)
    moved = N * (2 * U * P + 2 * D) * size + 3 * N * K * (D + 1) * sums
    # Two threads of a program decode, one after another's logits; then come mass and rows as in a step.
    operations = N * (2.0 * U * P * (K * K.bit_length() + K) + 5.0 * K * D)
    work = Work(N, schedule.threads, moved, moved, operations, steps=1, trips=5, shared_trips=2 + U, barriers=5)
    return (Program("decode_heads", (("B", 1), ("H", 1)), schedule.threads, work),)
