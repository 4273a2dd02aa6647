"""decode_heads in TIR for GPUs: a layer's token between its two projections in one launch, one program per head."""

from __future__ import annotations

from typing import Any

import tvm
import tvm.tirx as tir
from tvm.script import tirx as T

from lowering import emit
from lowering.cpu.address_decode import Decoder
from lowering.gpu.memory_step.template import token
from lowering.gpu.threads import Threads
from schedules.gpu.step import DecodeHeads
from schedules.workload import Workload


def module(
    workload: Workload, schedule: DecodeHeads, cuda: bool, state: str = "float32", reverse_threads: bool = False
) -> Any:
    """Return the kernel's IRModule (paper, steps 1 to 6).

    Its parameters are projected [B, 2·H·U·P + H·D], the products of x with W_q, W_k and W_v; log_scale [2, H], α of W_q
    and W_k; position int64 [B]; memory [B, H, M, D] and mass [B, H, M] of dtype ``state``, updated in place; and output
    [B, H, D]. B and H are dynamic. The workload has two more constants: ``temperature``, 1 by default, and
    ``cape_heads``, the number of first heads that use CAPE, 0 by default.
    """
    M, D, dtype = workload.shape["M"], workload.shape["D"], workload.dtype
    threads = Threads(schedule.threads, cuda, reverse_threads)

    @T.prim_func(s_tir=True)
    def decode_heads(
        projected: T.handle, log_scale: T.handle, position: T.handle, memory: T.handle, mass: T.handle,
        output: T.handle,
    ):  # fmt: skip
        T.func_attr({"global_symbol": "decode_heads", "tir.noalias": True})
        B = T.int64()
        H = T.int64()
        width = T.int64()
        X = emit.argument(projected, (B, width), dtype)
        A = emit.argument(log_scale, (2, H), dtype)
        t = emit.argument(position, (B,), "int64")
        S = emit.argument(memory, (B, H, M, D), state)
        Z = emit.argument(mass, (B, H, M), state)
        O = emit.argument(output, (B, H, D), dtype)
        for b in T.thread_binding(B, thread="blockIdx.x") if cuda else T.parallel(B):
            for h in T.thread_binding(H, thread="blockIdx.y") if cuda else T.serial(H):
                with T.sblock("decode"):
                    vb, vh = T.axis.remap("SS", [b, h])
                    T.reads(X[vb, 0:width], A[0:2, vh], t[vb], S[vb, vh, 0:M, 0:D], Z[vb, vh, 0:M])
                    T.writes(O[vb, vh, 0:D], S[vb, vh, 0:M, 0:D], Z[vb, vh, 0:M])
                    with threads.program():
                        _head(workload, schedule, threads, (vb, vh, H), (X, A, t), S, Z, O)

    return tvm.IRModule({"decode_heads": threads.bound(decode_heads)})


def _head(workload: Workload, schedule: DecodeHeads, threads: Threads, at: tuple[Any, Any, Any],
          inputs: tuple[Any, Any, Any], S: Any, Z: Any, O: Any) -> None:  # fmt: skip
    U, P, K, D = (workload.shape[axis] for axis in "UPKD")
    (b, h, heads), X = at, inputs[0]
    sums = emit.sum_type(workload.dtype)
    # Row 0 holds the query's addresses, which are read; row 1 the key's, which are written.
    logits, slots, weights = (
        threads.shared(shape, kind) for shape, kind in (((2, U, P), sums), ((2, K), "int32"), ((2, K), sums))
    )
    _addresses(workload, schedule, threads, at, inputs, logits, slots, weights)
    by_k = (lambda k: slots[1, k], lambda k: weights[1, k], lambda k: slots[0, k], lambda k: weights[0, k])
    values = heads * (2 * U * P) + h * D
    token(workload, threads, (b, h), by_k, lambda d: X[b, values + d], S, Z,
          lambda d, total: emit.store(O, [b, h, d], total))  # fmt: skip


def _addresses(workload: Workload, schedule: DecodeHeads, threads: Threads, at: tuple[Any, Any, Any],
               inputs: tuple[Any, Any, Any], logits: Any, slots: Any, weights: Any) -> None:  # fmt: skip
    """Emit the decoding of a head's query and key to slots and weights, each by one thread."""
    U, P, K, M = (workload.shape[axis] for axis in "UPKM")
    (b, h, heads), (X, A, t) = at, inputs
    sums = emit.sum_type(workload.dtype)
    temperature = emit.constant(workload.constants.get("temperature", 1.0), sums)
    cape_heads = int(workload.constants.get("cape_heads", 0))

    def scale(e: Any) -> None:
        side, rest = e // (U * P), e % (U * P)
        factor = tir.exp(A[side, h].astype(sums)) / temperature
        logit = X[b, (side * heads + h) * (U * P) + rest].astype(sums)
        emit.store(logits, [side, rest // P, rest % P], logit * factor)

    def decode(row: Any) -> None:
        Decoder(workload, 1, schedule.unroll, "local" if threads.cuda else "global").emit(row, logits, slots, weights)

    def shift(e: Any) -> None:
        moved = (slots[e // K, e % K].astype("int64") - t[b]) % emit.constant(M, "int64")
        emit.store(slots, [e // K, e % K], moved.astype("int32"))

    threads.spread(2 * U * P, scale)
    threads.barrier()
    threads.spread(2, decode)
    threads.barrier()
    if cape_heads:
        emit.below(h, emit.constant(cape_heads, "int64"), lambda _: threads.spread(2 * K, shift))
        threads.barrier()
