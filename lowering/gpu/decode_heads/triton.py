"""decode_heads: a layer's token between its two projections in one launch (paper, steps 1 to 6), one program per head.

Addresses stay in registers, so a token waits for memory twice: for the logits, then for the state. Positions, one per
sequence, are read from the device, so that the launch can be captured in a CUDA graph.
"""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from lowering.gpu.address_decode.beam import best_addresses
from lowering.gpu.address_decode.work import decode_iterations
from lowering.gpu.decode_heads.work import operand_bytes
from lowering.gpu.memory_step import triton as memory_step
from lowering.gpu.memory_step.triton import step_head
from lowering.gpu.memory_step.work import state_bytes
from lowering.gpu.plan import Plan
from lowering.gpu.resources import Work
from lowering.gpu.triton.launch import TritonLaunch
from lowering.gpu.triton.types import in_triton
from ramnet.ops.reference import sum_type
from schedules.gpu.step import DecodeHeads


@triton.jit
def decode_heads(
    projected, log_scale, position, memory, mass, output, H: tl.constexpr, U: tl.constexpr, P: tl.constexpr,
    K: tl.constexpr, M: tl.constexpr, D: tl.constexpr, CAPE_HEADS: tl.constexpr, TEMPERATURE: tl.constexpr,
    W: tl.constexpr, ROUNDS: tl.constexpr, UNROLL: tl.constexpr, TILE: tl.constexpr, POWER: tl.constexpr,
    EPS: tl.constexpr, ACC: tl.constexpr,
):  # fmt: skip
    """Compute output [B, H·D] of projected [B, 2·H·U·P + H·D], updating memory [B, H, M, D] and mass [B, H, M]."""
    n = tl.program_id(0).to(tl.int64)
    head = n % H
    token = projected + n // H * (2 * H * U * P + H * D)
    # Thread 2k + side finds all K addresses of the query (side 0, reads) or the key (side 1, writes) and keeps one.
    lane = tl.arange(0, 2 * W)
    side, place = lane % 2, lane // 2
    scale = tl.exp(tl.load(log_scale + side * H + head).to(ACC)) / TEMPERATURE
    scores, slots, norm = best_addresses(
        token + (side * H + head) * (U * P), scale, U, P, K, 2 * W, ROUNDS, UNROLL, ACC
    )
    score, slot = scores[0], slots[0]
    for k in tl.static_range(1, K):
        score, slot = tl.where(place == k, scores[k], score), tl.where(place == k, slots[k], slot)
    weight = tl.exp(score) / norm
    if CAPE_HEADS > 0:
        # (slot − position) mod M, for a negative position too.
        shift = (tl.load(position + n // H) % M + M) % M
        slot -= tl.where(head < CAPE_HEADS, shift, 0).to(tl.int32)
        slot = tl.where(slot < 0, slot + M, slot)
    slot, weight = tl.where(place < K, slot, -1 - side), tl.where(place < K, weight, 0)
    read_slots, write_slots = tl.split(tl.reshape(slot, (W, 2)))
    read_weights, write_weights = tl.split(tl.reshape(weight, (W, 2)))
    step_head(
        write_slots, write_weights, read_slots, read_weights, token + 2 * H * U * P + head * D, memory + n * M * D,
        mass + n * M, output + n * D, D, TILE, POWER, EPS, ACC,
    )  # fmt: skip


def plan(
    projected: Tensor, log_scale: Tensor, position: Tensor, memory: Tensor, mass: Tensor, order: int, sub_dim: int,
    top_k: int, cape_heads: int, temperature: float, decay_power: float, eps: float, schedule: DecodeHeads,
) -> Plan:  # fmt: skip
    """Plan the output [B, H·D], of the dtype of ``projected``; arguments as in ``GpuKernels.decode_heads``."""
    batch, heads, slots, width = memory.shape
    output = projected.new_empty((batch, heads * width))
    arguments = {
        "projected": projected, "log_scale": log_scale, "position": position, "memory": memory, "mass": mass,
        "output": output, "H": heads, "U": order, "P": sub_dim, "K": top_k, "M": slots, "D": width,
        "CAPE_HEADS": cape_heads, "TEMPERATURE": temperature, "W": triton.next_power_of_2(top_k),
        "ROUNDS": (top_k - 1).bit_length(), "UNROLL": schedule.unroll,
        "TILE": memory_step.tile(top_k, width, schedule.threads), "POWER": decay_power, "EPS": eps,
        "ACC": in_triton(sum_type(projected, memory)),
    }  # fmt: skip
    programs = batch * heads
    moved = operand_bytes(programs, order, sub_dim, width, projected.element_size())
    moved += state_bytes(programs, top_k, width, memory.element_size())
    work = Work(
        programs=programs, threads=schedule.threads, dram_bytes=moved, cache_bytes=moved,
        # One trip for the state. Straight code loads all logits in one trip before it, a loop in one per sub-vector.
        trips=1 + (1 if schedule.unroll == 2 else order), barriers=2,
        iterations=decode_iterations(order, sub_dim, top_k),
    )  # fmt: skip
    return Plan((TritonLaunch(decode_heads, (programs,), arguments, schedule.threads, work),), (output,))
