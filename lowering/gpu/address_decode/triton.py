"""address_decode: each thread finds the K best addresses of one row of logits in its registers."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from lowering.gpu.address_decode.beam import best_addresses
from lowering.gpu.address_decode.work import decode
from lowering.gpu.plan import Plan
from lowering.gpu.triton.launch import TritonLaunch
from lowering.gpu.triton.ranked import side_by_side
from lowering.gpu.triton.types import in_triton
from ramnet.ops.reference import sum_type
from schedules.gpu.address import AddressDecode


@triton.jit(do_not_specialize=["R"])
def address_decode(
    logits, slots, weights, R, U: tl.constexpr, P: tl.constexpr, K: tl.constexpr, ROUNDS: tl.constexpr,
    UNROLL: tl.constexpr, THREADS: tl.constexpr, ACC: tl.constexpr,
):  # fmt: skip
    """Compute slots and weights [R, K] of logits [R, U, P]. Threads beyond the last row repeat it without storing."""
    row = tl.program_id(0).to(tl.int64) * THREADS + tl.arange(0, THREADS)
    scores, found, norm = best_addresses(
        logits + tl.minimum(row, R - 1) * (U * P), None, U, P, K, THREADS, ROUNDS, UNROLL, ACC
    )
    norm = 1 / norm
    shares = ()
    for k in tl.static_range(1 << ROUNDS):
        shares = shares + (tl.exp(scores[k]) * norm,)
    place = tl.arange(0, 1 << ROUNDS)[None, :]
    at = row[:, None] * K + place
    inside = (row < R)[:, None] & (place < K)
    tl.store(slots + at, side_by_side(found, THREADS, ROUNDS), mask=inside)
    tl.store(weights + at, side_by_side(shares, THREADS, ROUNDS).to(weights.dtype.element_ty), mask=inside)


def plan(rows: Tensor, top_k: int, schedule: AddressDecode) -> Plan:
    """Plan slots int32 [R, K] and descending weights [R, K] of logits ``rows`` [R, U, P], which have the same dtype."""
    count, order, sub_dim = rows.shape
    slots = rows.new_empty((count, top_k), dtype=torch.int32)
    weights = rows.new_empty((count, top_k))
    programs = triton.cdiv(count, schedule.threads)
    arguments = {
        "logits": rows, "slots": slots, "weights": weights, "R": count, "U": order, "P": sub_dim, "K": top_k,
        "ROUNDS": (top_k - 1).bit_length(), "UNROLL": schedule.unroll, "THREADS": schedule.threads,
        "ACC": in_triton(sum_type(rows)),
    }  # fmt: skip
    work = decode(count, order, sub_dim, top_k, rows.element_size(), schedule)
    return Plan((TritonLaunch(address_decode, (programs,), arguments, schedule.threads, work),), (slots, weights))
