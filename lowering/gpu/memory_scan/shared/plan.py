"""The plans of the scans of form "shared", by TIR, and the work of their launches."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from lowering.gpu.plan import Plan
from lowering.gpu.resources import Work
from lowering.gpu.tir import Kernels, TirLaunch, aligned, types
from schedules.gpu import shared
from schedules.gpu.shared import BYTES, SUM_THREADS, THREADS, SharedScan, SharedScanBackward, word
from schedules.workload import Workload

# Bytes that memory moves at least.
_SECTOR = 32


def plan(
    write_slots: Tensor, write_weights: Tensor, read_slots: Tensor, read_weights: Tensor, values: Tensor,
    memory: Tensor, mass: Tensor, decay_power: float, eps: float, schedule: SharedScan,
) -> Plan:  # fmt: skip
    """Plan memory_scan; see ``lowering.gpu.memory_scan.serial.forward.plan``. Outputs are float64 if an input is."""
    dtype, state, _ = types(values, memory, mass, write_weights)
    sizes, constants = (*write_slots.shape, *memory.shape[1:]), {"decay_power": decay_power, "eps": eps}
    kernels = Kernels(_forward, "memory_scan", sizes, dtype, state, schedule, constants)
    schedule.require(kernels.workload)
    given = (write_slots, write_weights.to(dtype), read_slots, read_weights.to(dtype), values.to(dtype),
             memory.to(state), mass.to(state))  # fmt: skip
    inputs = tuple(map(aligned, given))
    outputs = tuple(torch.empty_like(x) for x in inputs[4:])
    return Plan((_walk(kernels, "memory_scan", (*inputs, *outputs)),), outputs)


def plan_backward(
    grad_output: Tensor, grad_memory: Tensor, grad_mass: Tensor, write_slots: Tensor, write_weights: Tensor,
    read_slots: Tensor, read_weights: Tensor, values: Tensor, memory: Tensor, mass: Tensor, decay_power: float,
    eps: float, proxy_eps: float, schedule: SharedScanBackward,
) -> Plan:  # fmt: skip
    """Plan the gradients; see ``lowering.gpu.memory_scan.slots.backward.plan``. They are float64 if an input is."""
    dtype, state, sums = types(values, memory, mass, write_weights)
    (heads, T, K), D = write_slots.shape, memory.shape[-1]
    constants = {"decay_power": decay_power, "eps": eps, "proxy_eps": proxy_eps}
    sizes = (heads, T, K, *memory.shape[1:])
    kernels = Kernels(_backward, "memory_scan_backward", sizes, dtype, state, schedule, constants)
    schedule.require(kernels.workload)
    count, padded = -(-D // schedule.tile), -(-T // schedule.chunk) * schedule.chunk
    group = schedule.group(heads)

    def scratch(*shape: int, of: torch.dtype = sums) -> Tensor:
        return values.new_empty((group, *shape), dtype=of)

    history = scratch(padded, K, count * schedule.tile, of=dtype if dtype == torch.bfloat16 else sums)
    masses, parts = [scratch(padded, K) for _ in range(3)], [scratch(count, padded, K) for _ in range(2)]
    given = [
        write_slots, read_slots, *(x.to(dtype) for x in (grad_output, write_weights, read_weights, values)),
        *(x.to(state) for x in (grad_memory, grad_mass, memory, mass)),
    ]  # fmt: skip
    given = [aligned(x) for x in given]
    grads = [torch.empty_like(x, dtype=dtype) for x in (write_weights, read_weights, values)]
    grads += [torch.empty_like(x, dtype=state) for x in (memory, mass)]
    launches = []
    for first in range(0, heads, group):
        some, size = slice(first, first + group), min(group, heads - first)
        kept_rows, old, inverses, pushes, read_parts, write_parts = (x[:size] for x in (history, *masses, *parts))
        WS, RS, dO, W, R, V, dS1, dZ1, S0, Z0 = (x[some] for x in given)
        dW, dR, dV, dS, dZ = (x[some] for x in grads)
        back = (dO, dS1, dZ1, WS, W, RS, R, V, kept_rows, old, inverses, pushes, dV, write_parts, dS, dZ)
        launches += [
            _walk(kernels, "recompute", (dO, WS, W, RS, V, S0, Z0, kept_rows, read_parts, old, inverses)),
            _sum(kernels, "reads", (read_parts, R, inverses, dR, pushes)),
            _walk(kernels, "reverse", back),
            _sum(kernels, "writes", (write_parts, dW)),
        ]
    return Plan(tuple(launches), tuple(grads))


@dataclass(frozen=True)
class _Walked:
    """The work of a scan's kernel per token.

    Attributes:
        operands: the arrays that it reads.
        by_slot, by_channel: the numbers of arrays that it writes, of K elements and of D elements per token.
        kept: whether it saves or reads the rows before writes.
        rows: how often a slot's row is loaded from or stored to shared memory.
    """

    operands: shared.Operands
    by_slot: int
    by_channel: int
    kept: bool
    rows: int


_WALKS = {
    "memory_scan": _Walked(shared.FORWARD, 0, 1, False, 3),
    "recompute": _Walked(shared.RECOMPUTE, 1, 0, True, 3),
    "reverse": _Walked(shared.REVERSE, 1, 1, True, 4),
}


def _walk(kernels: Kernels, name: str, tensors: tuple[Tensor, ...]) -> TirLaunch:
    """Return the launch of a scan. The tiles of a head run at the same time, so they share its addresses in L2."""
    workload, schedule, heads = kernels.workload, kernels.schedule, tensors[0].shape[0]
    T, K, M, D = (workload.shape[axis] for axis in "TKMD")
    walk, size, sums = _WALKS[name], BYTES[workload.dtype], word(workload)
    of, tile, count = walk.operands, schedule.tile, schedule.tiles(workload)
    programs = heads * count
    by_slot = K * (of.slots * 4 + of.by_slot * size + walk.by_slot * sums)
    by_channel = D * (of.by_channel + walk.by_channel) * size
    kept = _kept_bytes(workload, tile, writes=name == "recompute") if walk.kept else 0
    state = 2 * heads * M * (D + 1) * sums
    moved = heads * T * (by_slot + by_channel + kept) + state
    again = heads * T * (by_slot * count + by_channel + kept) + state
    # A warp's access to shared memory takes one cycle for each LINE bytes, and more where narrow rows share banks.
    rows = walk.rows * K * tile * sums * schedule.collisions(workload)
    turns = of.slots + of.by_slot + of.by_channel + 3
    work = Work(
        programs, THREADS, moved, again, steps=T, trips=0, shared_trips=2,
        shared_bytes=float(programs * T * (rows + turns * shared.LINE)),
        iterations=(-(-T // schedule.chunk), schedule.chunk // schedule.straight),
    )  # fmt: skip
    return TirLaunch(kernels, name, (count, heads), tensors, THREADS, work)


def _kept_bytes(workload: Workload, tile: int, writes: bool) -> float:
    """Return the bytes of memory that the saved rows of a token cost.

    Each tile's part of a row is accessed at another time. If it is less than a sector, memory moves the whole sector,
    which it reads first to write a part.
    """
    size = BYTES[shared.history_type(workload)]
    part = min(tile, workload.shape["D"]) * size
    more = max(1.0, _SECTOR / part) * (2 if writes and part < _SECTOR else 1)
    return workload.shape["K"] * workload.shape["D"] * size * more


def _sum(kernels: Kernels, name: str, tensors: tuple[Tensor, ...]) -> TirLaunch:
    workload, schedule, heads = kernels.workload, kernels.schedule, tensors[0].shape[0]
    T, K = workload.shape["T"], workload.shape["K"]
    size, sums, count = BYTES[workload.dtype], word(workload), schedule.tiles(workload)
    moved = heads * T * K * (count * sums + size + (2 * sums + size if name == "reads" else 0))
    blocks = -(-T * K // SUM_THREADS)
    work = Work(blocks * heads, SUM_THREADS, moved, moved)
    return TirLaunch(kernels, name, (blocks, heads), tensors, SUM_THREADS, work)


def _forward(*how: Any) -> Any:
    from lowering.gpu.memory_scan.shared.forward import module

    return module(*how)


def _backward(*how: Any) -> Any:
    from lowering.gpu.memory_scan.shared.backward import module

    return module(*how)
