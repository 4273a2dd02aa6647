"""address_decode_backward: ∂w_k/∂logit[u, p] = w_k·([digit_u(slot_k) = p] − softmax_u[p]), a thread a row."""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from lowering.triton.launch import Launch, Plan
from lowering.triton.ranked import columns
from lowering.triton.types import in_triton, sum_type
from lowering.work import Work
from schedules.gpu.address import AddressDecodeBackward


@triton.jit(do_not_specialize=["R"])
def address_decode_backward(
    grad_weights, logits, slots, weights, grad_logits, R, U: tl.constexpr, P: tl.constexpr, K: tl.constexpr,
    ROUNDS: tl.constexpr, THREADS: tl.constexpr, ACC: tl.constexpr,
):  # fmt: skip
    """grad_logits [R, U, P]; a sub-vector's digits are what remains of the slots after division by P, u times."""
    row = tl.program_id(0).to(tl.int64) * THREADS + tl.arange(0, THREADS)
    inside = row < R
    row = tl.minimum(row, R - 1)
    place = tl.arange(0, 1 << ROUNDS)[None, :]
    at, taken = row[:, None] * K + place, place < K
    scaled = tl.load(grad_weights + at, mask=taken, other=0).to(ACC) * tl.load(weights + at, mask=taken, other=0)
    total = tl.sum(scaled, 1)
    scaled, rest = columns(scaled, THREADS, ROUNDS), columns(tl.load(slots + at, mask=taken, other=0), THREADS, ROUNDS)
    for u in range(U):
        sub_vector = row * (U * P) + u * P
        largest = tl.full((THREADS,), float("-inf"), ACC)
        for p in range(P):
            largest = tl.maximum(largest, tl.load(logits + sub_vector + p).to(ACC))
        norm = tl.zeros((THREADS,), ACC)
        for p in range(P):
            norm += tl.exp(tl.load(logits + sub_vector + p).to(ACC) - largest)
        share = total / norm
        for p in range(P):
            grad = -tl.exp(tl.load(logits + sub_vector + p).to(ACC) - largest) * share
            for k in tl.static_range(K):
                grad += tl.where(rest[k] % P == p, scaled[k], 0)
            tl.store(grad_logits + sub_vector + p, grad, mask=inside)
        remaining = ()
        for k in tl.static_range(1 << ROUNDS):
            remaining = remaining + (rest[k] // P,)
        rest = remaining


def plan(grad_weights: Tensor, logits: Tensor, slots: Tensor, weights: Tensor, schedule: AddressDecodeBackward) -> Plan:
    """Gradient [R, U, P] of ``logits``; grad_weights, slots int32 and weights are [R, K]."""
    count, order, sub_dim = logits.shape
    top_k = slots.shape[1]
    grad_logits = logits.new_empty(logits.shape)
    programs = triton.cdiv(count, schedule.threads)
    arguments = {
        "grad_weights": grad_weights, "logits": logits, "slots": slots, "weights": weights, "grad_logits": grad_logits,
        "R": count, "U": order, "P": sub_dim, "K": top_k, "ROUNDS": (top_k - 1).bit_length(),
        "THREADS": schedule.threads, "ACC": in_triton(sum_type(grad_weights, logits, weights)),
    }  # fmt: skip
    moved = sum(x.nbytes for x in (grad_weights, logits, slots, weights, grad_logits))
    work = Work(
        programs=programs, threads=schedule.threads, dram_bytes=moved, cache_bytes=moved,
        # A logit takes 10 of its own and 3 an address (a digit compared, a share selected, a sum); a digit takes 5.
        operations=count * order * (sub_dim * (10 + 3 * top_k) + 5 * top_k), steps=order,
    )  # fmt: skip
    launch = Launch(address_decode_backward, (programs,), arguments, schedule.threads, work)
    return Plan((launch,), (grad_logits,))
