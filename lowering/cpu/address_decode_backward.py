"""address_decode_backward in TIR. Each vector lane handles one row of logits, as in the forward."""

from __future__ import annotations

from typing import Any

import tvm
import tvm.tirx as tir
from tvm.script import tirx as T
from tvm.script.ir_builder import tirx as builder

from lowering import emit
from schedules.cpu import AddressDecodeBackward
from schedules.workload import Workload

# The largest K·P for which a GPU's loops are unrolled, so that their buffers stay in registers.
_MOST_STRAIGHT = 256


def module(workload: Workload, schedule: AddressDecodeBackward) -> Any:
    """Return the kernel's IRModule: ∂w_k/∂logit[u, p] = w_k · ([digit_u(slot_k) = p] − softmax_u[p]).

    Its parameters are grad_weights [R, K], logits [R, U, P], slots int32 [R, K], weights [R, K] and the output
    grad_logits [R, U, P]. R is dynamic and must be at least ``lanes``.
    """
    U, P, K = (workload.shape[axis] for axis in "UPK")
    dtype, lanes = workload.dtype, schedule.lanes

    @T.prim_func(s_tir=True)
    def address_decode_backward(
        grad_weights: T.handle, logits: T.handle, slots: T.handle, weights: T.handle, grad_logits: T.handle
    ):
        T.func_attr({"global_symbol": "address_decode_backward", "tir.noalias": True})
        rows = T.int64()
        dW = emit.argument(grad_weights, (rows, K), dtype)
        X = emit.argument(logits, (rows, U, P), dtype)
        S = emit.argument(slots, (rows, K), "int32")
        W = emit.argument(weights, (rows, K), dtype)
        dX = emit.argument(grad_logits, (rows, U, P), dtype)
        for b in T.serial((rows + lanes - 1) // lanes):
            with T.sblock("decode"):
                vb = T.axis.spatial((rows + lanes - 1) // lanes, b)
                T.reads(dW[0:rows, 0:K], X[0:rows, 0:U, 0:P], S[0:rows, 0:K], W[0:rows, 0:K])
                T.writes(dX[0:rows, 0:U, 0:P])
                first = T.sblock_alloc_buffer((1,), "int32")
                first[0] = T.min(vb * lanes, rows - lanes)
                differentiate(workload, lanes, first[0], dW, X, S, W, dX)

    plan = tvm.s_tir.Schedule(address_decode_backward)
    if schedule.parallel:
        plan.parallel(*plan.get_loops(plan.get_sblock("decode")))
    return plan.mod


def differentiate(workload: Workload, lanes: int, first: Any, dW: Any, X: Any, S: Any, W: Any, dX: Any,
                  scope: str = "global") -> None:  # fmt: skip
    """Emit the gradient of ``lanes`` rows from ``first``; ``scope`` is that of the local buffers."""
    U, P, K = (workload.shape[axis] for axis in "UPK")
    dtype = emit.sum_type(workload.dtype)
    # Registers can only be indexed by constants, so loops over them are unrolled.
    each = builder.unroll if scope == "local" and K * P <= _MOST_STRAIGHT else builder.serial
    scaled = T.sblock_alloc_buffer((K, lanes), dtype, scope=scope)  # w_k · ∂w_k
    rest = T.sblock_alloc_buffer((K, lanes), "int32", scope=scope)  # the slot without the digits seen so far
    hits = T.sblock_alloc_buffer((P, lanes), dtype, scope=scope)
    shares = T.sblock_alloc_buffer((P, lanes), dtype, scope=scope)  # e^(logit − max)
    total, largest, norm = (T.sblock_alloc_buffer((lanes,), dtype, scope=scope) for _ in range(3))
    zero, sub_dim = emit.constant(0, dtype), emit.constant(P, "int32")

    def logit(lane: Any, u: Any, p: Any) -> Any:
        return X[first + lane, u, p].astype(dtype)

    emit.lanes(lanes, (total, [], lambda _: zero))
    with each(0, K) as k, builder.vectorized(0, lanes) as lane:
        emit.store(scaled, [k, lane], dW[first + lane, k].astype(dtype) * W[first + lane, k].astype(dtype))
        emit.store(rest, [k, lane], S[first + lane, k])
        emit.store(total, [lane], total[lane] + scaled[k, lane])
    with builder.serial(0, U) as u:
        emit.lanes(lanes, (largest, [], lambda lane: logit(lane, u, 0)), (norm, [], lambda _: zero))
        with each(0, P) as p, builder.vectorized(0, lanes) as lane:
            emit.store(largest, [lane], tir.max(largest[lane], logit(lane, u, p)))
        with each(0, P) as p, builder.vectorized(0, lanes) as lane:
            emit.store(shares, [p, lane], emit.exp(logit(lane, u, p) - largest[lane], dtype))
            emit.store(norm, [lane], norm[lane] + shares[p, lane])
            emit.store(hits, [p, lane], zero)
        with each(0, K) as k:
            with each(0, P) as p, builder.vectorized(0, lanes) as lane:
                hit = tir.truncmod(rest[k, lane], sub_dim) == p
                emit.store(hits, [p, lane], hits[p, lane] + tir.Select(hit, scaled[k, lane], zero))
            emit.lanes(lanes, (rest, [k], lambda lane: tir.truncdiv(rest[k, lane], sub_dim)))
        with each(0, P) as p, builder.vectorized(0, lanes) as lane:
            softmax = shares[p, lane] / norm[lane]
            emit.store(dX, [first + lane, u, p], (hits[p, lane] - softmax * total[lane]).astype(dX.dtype))
