"""memory_scan, serial in time (paper, steps 5 and 6).

A program scans the tokens of a head for a tile of channels. Every thread loads and stores only its own columns of the
state, so the scan needs no barrier.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from lowering.gpu.memory_scan.serial import mass as memory_scan_mass
from lowering.gpu.memory_scan.serial import mass_spans
from lowering.gpu.plan import Launch, Plan
from lowering.gpu.resources import Work
from lowering.gpu.triton.arithmetic import decay, load_each, load_inside, load_rows, store_inside
from lowering.gpu.triton.copying import copy
from lowering.gpu.triton.launch import TritonLaunch
from lowering.gpu.triton.types import in_triton
from ramnet.ops.accesses import Accesses
from ramnet.ops.reference import sum_type
from schedules.gpu.serial import SerialScan


@triton.jit(do_not_specialize=["T"])
def scan_rows(
    write_slots, write_weights, read_slots, factors, values, state, output, T, M: tl.constexpr, K: tl.constexpr,
    D: tl.constexpr, TILE: tl.constexpr, POWER: tl.constexpr, ACC: tl.constexpr,
):  # fmt: skip
    """Compute output [N, T, D], updating state [N, M, D] in place; factors [N, T, K] are r / (z + ε) of each read.

    The rows that a token writes are loaded together with those that the token before reads, and slots and weights are
    loaded ahead of time, so that a token waits for memory once.
    """
    head = tl.program_id(0).to(tl.int64)
    channel = tl.program_id(1) * TILE + tl.arange(0, TILE)
    inside = None if D % TILE == 0 else channel < D
    rows = state + head * M * D + channel
    at = head * T * K
    value_at = head * T * D + channel
    write_slot, weight = load_each(write_slots + at, K), load_each(write_weights + at, K)
    next_write_slot = load_each(write_slots + at + tl.minimum(T - 1, 1) * K, K)
    read_slot = load_each(read_slots + at, K)
    value = load_inside(values + value_at, inside)
    held = load_rows(rows, write_slot, D, inside)
    for t in range(T):
        one = tl.minimum(T - 1 - t, 1)
        two = tl.minimum(T - 1 - t, 2)
        far_write_slot = load_each(write_slots + at + two * K, K)
        next_weight = load_each(write_weights + at + one * K, K)
        next_read_slot = load_each(read_slots + at + one * K, K)
        next_value = load_inside(values + value_at + one * D, inside)
        factor = load_each(factors + at, K)
        for k in tl.static_range(K):
            w = weight[k].to(ACC)
            store_inside(rows + write_slot[k].to(tl.int64) * D, decay(w, POWER) * held[k] + w * value.to(ACC), inside)
        read = load_rows(rows, read_slot, D, inside)
        held = load_rows(rows, next_write_slot, D, inside)
        total = factor[0] * read[0]
        for k in tl.static_range(1, K):
            total += factor[k] * read[k]
        store_inside(output + value_at, total, inside)
        write_slot, next_write_slot, weight = next_write_slot, far_write_slot, next_weight
        read_slot, value = next_read_slot, next_value
        at += K
        value_at += D


def plan(
    write_slots: Tensor, write_weights: Tensor, read_slots: Tensor, read_weights: Tensor, values: Tensor,
    memory: Tensor, mass: Tensor, decay_power: float, eps: float, schedule: SerialScan,
) -> Plan:  # fmt: skip
    """Plan output [N, T, D] of the dtype of ``values``, and the new memory [N, M, D] and mass [N, M] of their dtypes.

    Args:
        write_slots, write_weights, read_slots, read_weights: [N, T, K], slots int32.
        values: [N, T, D].
        memory, mass: the state before the first token, [N, M, D] and [N, M].
    """
    acc = sum_type(values, write_weights, memory)
    output, new_memory, new_mass = torch.empty_like(values), torch.empty_like(memory), torch.empty_like(mass)
    # The scan accumulates in ``acc``; if that is the state's dtype, it updates the result tensors directly.
    state = new_memory if memory.dtype == acc else torch.empty_like(memory, dtype=acc)
    spans = mass_spans.number(write_slots.shape[1], schedule.spans)
    z = new_mass.unsqueeze(0) if mass.dtype == acc and spans == 1 else mass.new_empty((spans, *mass.shape), dtype=acc)
    accesses = Accesses(write_slots, write_weights, read_slots, read_weights)
    mass_walk, factors = memory_scan_mass.forward(accesses, z, decay_power, eps)
    launches = [copy(memory, state), copy(mass, z[0]), *mass_walk]
    launches.append(_rows(accesses, factors, values, state, output, decay_power, schedule))
    if state is not new_memory:
        launches.append(copy(state, new_memory))
    if mass.dtype != acc or spans > 1:
        launches.append(copy(z[-1], new_mass))
    return Plan(tuple(launches), (output, new_memory, new_mass))


def _rows(
    accesses: Accesses, factors: Tensor, values: Tensor, state: Tensor, output: Tensor, decay_power: float,
    schedule: SerialScan,
) -> Launch:  # fmt: skip
    write_slots, write_weights, read_slots, _ = accesses
    heads, tokens, top_k = write_slots.shape
    slots, width = state.shape[1:]
    tiles = triton.cdiv(width, schedule.tile)
    threads = row_threads(schedule, state.dtype)
    arguments = {
        "write_slots": write_slots, "write_weights": write_weights, "read_slots": read_slots, "factors": factors,
        "values": values, "state": state, "output": output, "T": tokens, "M": slots, "K": top_k, "D": width,
        "TILE": schedule.tile, "POWER": decay_power, "ACC": in_triton(state.dtype),
    }  # fmt: skip
    operands = sum(x.nbytes for x in (write_slots, write_weights, read_slots, factors))
    channels = values.nbytes + output.nbytes
    moved = 3 * write_slots.numel() * width  # a write loads and stores a row, a read loads one
    work = Work(
        programs=heads * tiles, threads=threads,
        dram_bytes=operands + channels + 2 * state.nbytes,
        cache_bytes=tiles * operands + channels + moved * state.element_size(), steps=tokens,
        reused_bytes=state.nbytes,
    )  # fmt: skip
    return TritonLaunch(scan_rows, (heads, tiles), arguments, threads, work)


def row_threads(schedule: SerialScan, acc: torch.dtype) -> int:
    """Return the threads of a program, such that a thread's channels are at most 16 bytes, one load or store.

    In float64, that is half of the channels that ``schedule`` may give a thread; see ``schedules.gpu.serial``.
    """
    return max(schedule.threads, schedule.tile * acc.itemsize // 16)
