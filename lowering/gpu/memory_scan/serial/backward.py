"""Backward of memory_scan, serial in time (paper, steps 5 to 7).

Tokens are recomputed from copies of the state, which are ``checkpoint`` tokens apart, saving the rows that writes
replace, and are then visited in reverse. Decays are not inverted, as they may be 0.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
import triton
from torch import Tensor

from lowering.gpu.memory_scan.serial import mass as memory_scan_mass
from lowering.gpu.memory_scan.serial import mass_backward as memory_scan_mass_backward
from lowering.gpu.memory_scan.serial import mass_spans
from lowering.gpu.memory_scan.serial.forward import row_threads
from lowering.gpu.memory_scan.serial.rows_backward import scan_rows_backward
from lowering.gpu.plan import Launch, Plan
from lowering.gpu.resources import Work
from lowering.gpu.triton.copying import copy
from lowering.gpu.triton.launch import TritonLaunch
from lowering.gpu.triton.types import in_triton
from ramnet.ops.accesses import Accesses
from ramnet.ops.reference import sum_type
from schedules.gpu.serial import SerialScanBackward


def plan(
    grad_output: Tensor, grad_memory: Tensor, grad_mass: Tensor, write_slots: Tensor, write_weights: Tensor,
    read_slots: Tensor, read_weights: Tensor, values: Tensor, memory: Tensor, mass: Tensor, decay_power: float,
    eps: float, proxy_eps: float, schedule: SerialScanBackward,
) -> Plan:  # fmt: skip
    """Plan the gradients of write_weights, read_weights, values, memory and mass, each of its tensor's shape and dtype.

    Args:
        grad_output: [N, T, D].
        grad_memory, grad_mass: gradients of the state after the last token, [N, M, D] and [N, M].
        write_slots, write_weights, read_slots, read_weights: [N, T, K], slots int32.
        values: [N, T, D].
        memory, mass: the state before the first token, [N, M, D] and [N, M].
    """
    heads, tokens, top_k = write_slots.shape
    acc = sum_type(values, write_weights, memory)
    grads = [torch.empty_like(x) for x in (write_weights, read_weights, values, memory, mass)]
    grad_weights, grad_read_weights, grad_values, grad_first_memory, grad_first_mass = grads
    # The reverse pass accumulates in ``acc``; if that is the state's dtype, it updates the result tensors directly.
    grad_state = grad_first_memory if memory.dtype == acc else torch.empty_like(memory, dtype=acc)
    spans = mass_spans.number(tokens, schedule.spans)
    z, grad_z = (mass.new_empty((spans, *mass.shape), dtype=acc) for _ in range(2))
    accesses = Accesses(write_slots, write_weights, read_slots, read_weights)
    mass_walk, factors = memory_scan_mass.forward(accesses, z, decay_power, eps, keep=True)
    kept = min(schedule.checkpoint, tokens)
    states = memory.new_empty((triton.cdiv(tokens, kept), *memory.shape), dtype=acc)
    history = memory.new_empty((heads, kept, top_k, memory.shape[2]), dtype=acc)
    tiles = triton.cdiv(memory.shape[2], schedule.tile)
    along_reads, along_writes = (memory.new_empty((heads, tiles, tokens, top_k), dtype=acc) for _ in range(2))
    rows = {
        "grad_output": grad_output, "write_slots": write_slots, "write_weights": write_weights,
        "read_slots": read_slots, "factors": factors.reads, "values": values, "states": states, "history": history,
        "grad_state": grad_state, "grad_values": grad_values, "along_reads": along_reads,
        "along_writes": along_writes,
    }  # fmt: skip
    launches = [
        copy(mass, z[0]),
        *mass_walk,
        copy(memory, states[0]),
        copy(grad_memory, grad_state),
        _rows(rows, decay_power, proxy_eps, schedule),
        copy(grad_mass, grad_z[-1]),
        *memory_scan_mass_backward.backward(
            along_reads, along_writes, accesses, factors, grad_z, grad_weights, grad_read_weights, decay_power,
            proxy_eps,
        ),
        copy(grad_z[0], grad_first_mass),
    ]  # fmt: skip
    if grad_state is not grad_first_memory:
        launches.append(copy(grad_state, grad_first_memory))
    return Plan(tuple(launches), tuple(grads))


def _rows(tensors: Mapping[str, Tensor], decay_power: float, proxy_eps: float, schedule: SerialScanBackward) -> Launch:
    """Return the launch of ``scan_rows_backward``; ``tensors`` are its arguments by name."""
    states, along = tensors["states"], tensors["along_reads"].nbytes + tensors["along_writes"].nbytes
    copies, heads, slots, width = states.shape
    tiles, tokens, top_k = tensors["along_reads"].shape[1:]
    kept = tensors["history"].shape[1]
    threads = row_threads(schedule, states.dtype)
    arguments = {
        **tensors, "T": tokens, "CHECKPOINT": kept, "M": slots, "K": top_k,
        "ROUNDS": (top_k - 1).bit_length(), "D": width, "TILE": schedule.tile, "POWER": decay_power,
        "PROXY_EPS": proxy_eps, "ACC": in_triton(states.dtype),
    }  # fmt: skip
    twice = (copies - 1) * kept / tokens  # the fraction of the tokens whose forward is run twice
    operands = sum(tensors[name].nbytes for name in ("write_slots", "write_weights", "read_slots", "factors"))
    channels = 2 * tensors["values"].nbytes + tensors["grad_output"].nbytes + tensors["grad_values"].nbytes
    accesses, state = tensors["write_slots"].numel() * width, tensors["grad_state"].nbytes
    # A write loads and stores its row and stores a copy of it; gradients of writes and reads are loaded and stored.
    rows = (2 * twice + 9) * accesses * states.element_size() + 2 * (copies - 1) * states[0].nbytes
    # The two sums over channels as compiled: one NVIDIA warp sums them without shared memory.
    exchange = threads > 32
    work = Work(
        programs=heads * tiles, threads=threads,
        dram_bytes=operands + channels + along + states.nbytes + 2 * state,
        cache_bytes=(2 + twice) * tiles * operands + channels + along + rows,
        steps=tokens, iterations=(copies, kept), trips=3 + twice + (copies - 1) * slots / 8 / tokens,
        shared_trips=4 if exchange else 2, barriers=10 if exchange else 2, reused_bytes=2 * state,
    )  # fmt: skip
    return TritonLaunch(scan_rows_backward, (heads, tiles), arguments, threads, work)
