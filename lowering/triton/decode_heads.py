"""decode_heads: a layer's token between its two projections in one launch (paper, steps 1 to 6), a program a head.

Nothing but the state is in memory between the steps: the addresses of the read and of the write, one in every second
thread, go through registers. The position comes from the device, so a CUDA graph can hold the launch.
"""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from lowering.triton import address_decode, memory_step
from lowering.triton.beam import best_addresses
from lowering.triton.launch import Launch, Plan
from lowering.triton.memory_step import step_head
from lowering.triton.ranked import side_by_side
from lowering.triton.types import in_triton, sum_type
from lowering.work import Work
from schedules.gpu.step import DecodeHeads


@triton.jit
def decode_heads(
    projected, log_scale, position, memory, mass, output, H: tl.constexpr, U: tl.constexpr, P: tl.constexpr,
    K: tl.constexpr, M: tl.constexpr, D: tl.constexpr, CAPE_HEADS: tl.constexpr, TEMPERATURE: tl.constexpr,
    ROUNDS: tl.constexpr, UNROLL: tl.constexpr, TILE: tl.constexpr, POWER: tl.constexpr, EPS: tl.constexpr,
    ACC: tl.constexpr,
):  # fmt: skip
    """output [B, H·D]; memory [B, H, M, D] and mass [B, H, M] in place; projected [B, 2·H·U·P + H·D]."""
    n = tl.program_id(0).to(tl.int64)
    head = n % H
    token = projected + n // H * (2 * H * U * P + H * D)
    side = tl.arange(0, 2)  # 0 the query, which reads, 1 the key, which writes
    scale = tl.exp(tl.load(log_scale + side * H + head).to(ACC)) / TEMPERATURE
    scores, slots, norm = best_addresses(token + (side * H + head) * (U * P), scale, U, P, K, 2, ROUNDS, UNROLL, ACC)
    weights = ()
    for k in tl.static_range(1 << ROUNDS):
        weights = weights + (tl.exp(scores[k]) / norm,)
    read_slots, write_slots = tl.split(tl.trans(side_by_side(slots, 2, ROUNDS)))
    read_weights, write_weights = tl.split(tl.trans(side_by_side(weights, 2, ROUNDS)))
    if CAPE_HEADS > 0:
        # (slot − position) mod M, whatever the position's sign.
        shift = (tl.load(position) % M + M) % M
        shift = tl.where(head < CAPE_HEADS, shift, 0).to(tl.int32)
        read_slots, write_slots = read_slots - shift, write_slots - shift
        read_slots = tl.where(read_slots < 0, read_slots + M, read_slots)
        write_slots = tl.where(write_slots < 0, write_slots + M, write_slots)
    taken = tl.arange(0, 1 << ROUNDS) < K
    step_head(
        tl.where(taken, write_slots, -1), tl.where(taken, write_weights, 0), tl.where(taken, read_slots, -2),
        tl.where(taken, read_weights, 0), token + 2 * H * U * P + head * D, memory + n * M * D, mass + n * M,
        output + n * D, D, TILE, POWER, EPS, ACC,
    )  # fmt: skip


def plan(
    projected: Tensor, log_scale: Tensor, position: Tensor, memory: Tensor, mass: Tensor, order: int, sub_dim: int,
    top_k: int, cape_heads: int, temperature: float, decay_power: float, eps: float, schedule: DecodeHeads,
) -> Plan:  # fmt: skip
    """Output [B, H·D] of the type of ``projected``; the arguments are those of ``GpuKernels.decode_heads``."""
    batch, heads, slots, width = memory.shape
    output = projected.new_empty((batch, heads * width))
    arguments = {
        "projected": projected, "log_scale": log_scale, "position": position, "memory": memory, "mass": mass,
        "output": output, "H": heads, "U": order, "P": sub_dim, "K": top_k, "M": slots, "D": width,
        "CAPE_HEADS": cape_heads, "TEMPERATURE": temperature, "ROUNDS": (top_k - 1).bit_length(),
        "UNROLL": schedule.unroll, "TILE": memory_step.tile(top_k, width, schedule.threads), "POWER": decay_power,
        "EPS": eps, "ACC": in_triton(sum_type(projected, memory)),
    }  # fmt: skip
    programs = batch * heads
    moved = projected.nbytes + output.nbytes + memory_step.state_bytes(memory.flatten(0, 1), top_k)
    # Every thread finds the addresses of the query or of the key.
    lanes = programs * schedule.threads
    work = Work(
        programs=programs, threads=schedule.threads, dram_bytes=moved, cache_bytes=moved,
        operations=lanes * address_decode.operations(order, sub_dim, top_k, schedule.unroll)
        + programs * memory_step.operations(top_k, width),
        trips=2, barriers=1,
    )  # fmt: skip
    return Plan((Launch(decode_heads, (programs,), arguments, schedule.threads, work),), (output,))
