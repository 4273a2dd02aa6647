"""memory_scan in TIR: one block over (batch·head, group of channels), each walking through the tokens."""

from __future__ import annotations

from typing import Any

import tvm
from tvm.script import tirx as T
from tvm.script.ir_builder import tirx as builder

from lowering import emit
from schedules.cpu import MemoryScan
from schedules.workload import Workload


def module(workload: Workload, schedule: MemoryScan) -> Any:
    """The IRModule of the kernel.

    Parameters: write_slots, write_weights, read_slots, read_weights [N, T, K], values [N, T, D], memory [N, M, D],
    mass [N, M]; output [N, T, D], new memory, new mass. N and T are taken at run time.

    RuntimeError (``emit.OUT_OF_RANGE``) for a slot outside 0..M-1, which no memory is touched for.
    """
    K, M, D = (workload.shape[axis] for axis in "KMD")
    dtype = workload.dtype
    groups, chunk = schedule.groups, schedule.chunk
    width = D // groups

    @T.prim_func(s_tir=True)
    def memory_scan(
        write_slots: T.handle, write_weights: T.handle, read_slots: T.handle, read_weights: T.handle,
        values: T.handle, memory: T.handle, mass: T.handle,
        output: T.handle, new_memory: T.handle, new_mass: T.handle,
    ):  # fmt: skip
        T.func_attr({"global_symbol": "memory_scan", "tir.noalias": True})
        N = T.int64()
        L = T.int64()
        WS = emit.argument(write_slots, (N, L, K), "int32")
        W = emit.argument(write_weights, (N, L, K), dtype)
        RS = emit.argument(read_slots, (N, L, K), "int32")
        R = emit.argument(read_weights, (N, L, K), dtype)
        V = emit.argument(values, (N, L, D), dtype)
        S0 = emit.argument(memory, (N, M, D), dtype)
        Z0 = emit.argument(mass, (N, M), dtype)
        O = emit.argument(output, (N, L, D), dtype)
        S = emit.argument(new_memory, (N, M, D), dtype)
        Z = emit.argument(new_mass, (N, M), dtype)
        outside = T.sblock_alloc_buffer((N,), "int32")  # whether some of a head's slots are out of range
        emit.clear(outside, N)
        for b in T.parallel(N * groups):
            with T.sblock("scan"):
                vn = T.axis.spatial(N, b // groups)
                vg = T.axis.spatial(T.int64(groups), b % groups)
                T.reads(
                    WS[vn, 0:L, 0:K], W[vn, 0:L, 0:K], RS[vn, 0:L, 0:K], R[vn, 0:L, 0:K],
                    V[vn, 0:L, vg * width : vg * width + width],
                    S0[vn, 0:M, vg * width : vg * width + width], Z0[vn, 0:M],
                )  # fmt: skip
                T.writes(
                    O[vn, 0:L, vg * width : vg * width + width],
                    S[vn, 0:M, vg * width : vg * width + width], Z[vn, 0:M], outside[vn],
                )  # fmt: skip
                z = T.sblock_alloc_buffer((M,), dtype)
                decays = T.sblock_alloc_buffer((chunk, K), dtype)
                factors = T.sblock_alloc_buffer((chunk, K), dtype)
                for i in T.serial(M):
                    z[i] = Z0[vn, i]
                for i in T.serial(M):
                    for d in T.vectorized(width):
                        S[vn, i, vg * width + d] = S0[vn, i, vg * width + d]
                for c in T.serial((L + chunk - 1) // chunk):
                    if _in_range(workload, schedule, vn, c, L, WS, RS):
                        _mass(workload, schedule, vn, c, L, WS, W, RS, R, z, decays, factors)
                        for q in T.serial(width // schedule.tile):
                            _tile(workload, schedule, vn, c, L, vg * width + q * schedule.tile,
                                  WS, W, RS, V, decays, factors, S, O)  # fmt: skip
                    else:
                        outside[vn] = 1
                if vg == 0:
                    for i in T.serial(M):
                        Z[vn, i] = z[i]
        emit.refuse_any(outside, N)

    return tvm.IRModule({"memory_scan": memory_scan})


def _in_range(workload: Workload, schedule: MemoryScan, n: Any, c: Any, tokens: Any, WS: Any, RS: Any) -> Any:
    """Whether the slots of a chunk are."""
    K, M = workload.shape["K"], workload.shape["M"]
    count = _tokens_in(c, schedule.chunk, tokens)
    return emit.slots_in_range((WS, RS), count, K, M, lambda i: [n, c * schedule.chunk + i])


def _mass(workload: Workload, schedule: MemoryScan, n: Any, c: Any, tokens: Any, WS: Any, W: Any, RS: Any, R: Any,
          z: Any, decays: Any, factors: Any) -> None:  # fmt: skip
    """One chunk of tokens: their decays (1 − w)^γ, the mass after each write, and what each read is scaled by."""
    K, dtype = workload.shape["K"], workload.dtype
    gamma, eps = workload.constants["decay_power"], workload.constants["eps"]
    chunk = schedule.chunk
    count = _tokens_in(c, chunk, tokens)
    with builder.serial(0, count) as i:
        emit.row(decays, [i], K, lambda k: emit.decay(W[n, c * chunk + i, k], gamma, dtype))
    with builder.serial(0, count) as i:
        t = c * chunk + i

        def write(k: Any) -> None:
            slot = WS[n, t, k]
            emit.store(z, [slot], decays[i, k] * z[slot] + W[n, t, k])

        emit.each_slot(K, schedule.unroll, write)
        emit.each_slot(K, schedule.unroll, lambda k: emit.store(factors, [i, k], z[RS[n, t, k]]))
    # Apart from the gather above, so that the divisions are a vector's: 1.41 ms rather than 1.56, best of 80.
    with builder.serial(0, count) as i:
        emit.row(factors, [i], K, lambda k: R[n, c * chunk + i, k] / (factors[i, k] + emit.constant(eps, dtype)))


def _tile(workload: Workload, schedule: MemoryScan, n: Any, c: Any, tokens: Any, start: Any, WS: Any, W: Any,
          RS: Any, V: Any, decays: Any, factors: Any, S: Any, O: Any) -> None:  # fmt: skip
    """One chunk of tokens on one tile of channels: write K rows, then read K rows."""
    K, tile, chunk = workload.shape["K"], schedule.tile, schedule.chunk

    with builder.serial(0, _tokens_in(c, chunk, tokens)) as i:
        t = c * chunk + i

        def write(k: Any) -> None:
            slot = WS[n, t, k]
            emit.tiles(S, [n, slot], start, tile, lambda d: decays[i, k] * S[n, slot, d] + W[n, t, k] * V[n, t, d])

        emit.each_slot(K, schedule.unroll, write)
        emit.sum_slots(
            K,
            schedule.unroll,
            lambda k: lambda d: factors[i, k] * S[n, RS[n, t, k], d],
            lambda value: emit.tiles(O, [n, t], start, tile, value),
            lambda d: O[n, t, d],
        )


def _tokens_in(c: Any, chunk: int, tokens: Any) -> Any:
    """How many tokens chunk ``c`` holds: ``chunk``, or what is left."""
    return tvm.tirx.min(tvm.tirx.const(chunk, "int32"), tokens - c * chunk)
