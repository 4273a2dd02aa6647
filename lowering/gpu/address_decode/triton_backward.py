"""address_decode_backward: ∂w_k/∂logit[u, p] = w_k·([digit_u(slot_k) = p] − softmax_u[p]); one thread per row."""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from lowering.gpu.address_decode.beam import load_logits
from lowering.gpu.address_decode.work import backward
from lowering.gpu.plan import Plan
from lowering.gpu.triton.launch import TritonLaunch
from lowering.gpu.triton.ranked import columns, side_by_side
from lowering.gpu.triton.types import in_triton
from ramnet.ops.reference import sum_type
from schedules.gpu.address import AddressDecodeBackward

# A thread holds a sub-vector of up to this many logits, and their gradients, in registers.
_STRAIGHT = 8


@triton.jit(do_not_specialize=["R"])
def address_decode_backward(
    grad_weights, logits, slots, weights, grad_logits, R, U: tl.constexpr, P: tl.constexpr, K: tl.constexpr,
    ROUNDS: tl.constexpr, STRAIGHT: tl.constexpr, THREADS: tl.constexpr, ACC: tl.constexpr,
):  # fmt: skip
    """Compute grad_logits [R, U, P]. The digits of sub-vector u are the slots divided by P^u, modulo P."""
    row = tl.program_id(0).to(tl.int64) * THREADS + tl.arange(0, THREADS)
    inside = row < R
    row = tl.minimum(row, R - 1)
    place = tl.arange(0, 1 << ROUNDS)[None, :]
    at, taken = row[:, None] * K + place, place < K
    scaled = tl.load(grad_weights + at, mask=taken, other=0).to(ACC) * tl.load(weights + at, mask=taken, other=0)
    total = tl.sum(scaled, 1)
    scaled, rest = columns(scaled, THREADS, ROUNDS), columns(tl.load(slots + at, mask=taken, other=0), THREADS, ROUNDS)
    for u in range(U):
        digits, remaining = (), ()
        for k in tl.static_range(len(rest)):
            digits, remaining = digits + (rest[k] % P,), remaining + (rest[k] // P,)
        sub_vector = row * (U * P) + u * P
        if STRAIGHT:
            _sub_vector(
                logits + sub_vector, grad_logits + sub_vector, scaled, digits, total, inside, P, K, THREADS, ACC
            )
        else:
            _long_sub_vector(logits + sub_vector, grad_logits + sub_vector, scaled, digits, total, inside, P, K, ACC)
        rest = remaining


@triton.jit
def _sub_vector(
    logits, grad_logits, scaled, digits, total, inside, P: tl.constexpr, K: tl.constexpr, THREADS: tl.constexpr,
    ACC: tl.constexpr,
):  # fmt: skip
    """Compute the gradient of one sub-vector in unrolled code, with all its logits in registers."""
    found = load_logits(logits, True, P, THREADS, ACC)
    largest = found[0]
    for p in tl.static_range(1, P):
        largest = tl.maximum(largest, found[p])
    norm = tl.zeros_like(total)
    shares = ()
    for p in tl.static_range(P):
        shares = shares + (tl.exp(found[p] - largest),)
        norm += shares[p]
    share = total / norm
    grads = ()
    for p in tl.static_range(P):
        grads = grads + (_hits(scaled, digits, p, K) - shares[p] * share,)
    if P & (P - 1) == 0:
        at = grad_logits[:, None] + tl.arange(0, P)[None, :]
        grad = side_by_side(grads, THREADS, (P - 1).bit_length())
        tl.store(at, grad.to(grad_logits.dtype.element_ty), mask=inside[:, None])
    else:
        for p in tl.static_range(P):
            tl.store(grad_logits + p, grads[p].to(grad_logits.dtype.element_ty), mask=inside)


@triton.jit
def _long_sub_vector(
    logits, grad_logits, scaled, digits, total, inside, P: tl.constexpr, K: tl.constexpr, ACC: tl.constexpr
):
    """Compute the gradient of one sub-vector in loops that read the logits three times."""
    largest = tl.full(total.shape, float("-inf"), ACC)
    for p in range(P):
        largest = tl.maximum(largest, tl.load(logits + p).to(ACC))
    norm = tl.zeros_like(total)
    for p in range(P):
        norm += tl.exp(tl.load(logits + p).to(ACC) - largest)
    share = total / norm
    for p in range(P):
        grad = _hits(scaled, digits, p, K) - tl.exp(tl.load(logits + p).to(ACC) - largest) * share
        tl.store(grad_logits + p, grad.to(grad_logits.dtype.element_ty), mask=inside)


@triton.jit
def _hits(scaled, digits, p, K: tl.constexpr):
    """Return Σ_k scaled_k over the addresses whose digit is p."""
    hits = tl.where(digits[0] == p, scaled[0], 0)
    for k in tl.static_range(1, K):
        hits += tl.where(digits[k] == p, scaled[k], 0)
    return hits


def plan(grad_weights: Tensor, logits: Tensor, slots: Tensor, weights: Tensor, schedule: AddressDecodeBackward) -> Plan:
    """Plan the gradient [R, U, P] of ``logits``; grad_weights, slots int32 and weights are [R, K]."""
    count, order, sub_dim = logits.shape
    top_k = slots.shape[1]
    grad_logits = logits.new_empty(logits.shape)
    programs = triton.cdiv(count, schedule.threads)
    arguments = {
        "grad_weights": grad_weights, "logits": logits, "slots": slots, "weights": weights, "grad_logits": grad_logits,
        "R": count, "U": order, "P": sub_dim, "K": top_k, "ROUNDS": (top_k - 1).bit_length(),
        "STRAIGHT": sub_dim <= _STRAIGHT, "THREADS": schedule.threads,
        "ACC": in_triton(sum_type(grad_weights, logits, weights)),
    }  # fmt: skip
    work = backward(count, order, sub_dim, top_k, logits.element_size(), schedule)
    launch = TritonLaunch(address_decode_backward, (programs,), arguments, schedule.threads, work)
    return Plan((launch,), (grad_logits,))
