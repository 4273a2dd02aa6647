"""memory_step in TIR: one token of the scan, in place; a block over batch·head touches K rows and no more."""

from __future__ import annotations

from typing import Any

import tvm
from tvm.script import tirx as T
from tvm.script.ir_builder import tirx as builder

from lowering.tir import emit
from schedules.cpu import MemoryStep
from schedules.workload import Workload


def module(workload: Workload, schedule: MemoryStep) -> Any:
    """The IRModule of the kernel.

    Parameters: write_slots, write_weights, read_slots, read_weights [N, K], values [N, D], then memory [N, M, D] and
    mass [N, M], updated in place; output [N, D]. N is taken at run time.
    """
    K, M, D = (workload.shape[axis] for axis in "KMD")
    dtype = workload.dtype
    # A block that reads what it writes cannot be made parallel afterwards by a Schedule, so the loop is born so.
    heads = T.parallel if schedule.parallel else T.serial

    @T.prim_func(s_tir=True)
    def memory_step(
        write_slots: T.handle, write_weights: T.handle, read_slots: T.handle, read_weights: T.handle,
        values: T.handle, memory: T.handle, mass: T.handle, output: T.handle,
    ):  # fmt: skip
        T.func_attr({"global_symbol": "memory_step", "tir.noalias": True})
        N = T.int32()
        WS = T.match_buffer(write_slots, (N, K), "int32")
        W = T.match_buffer(write_weights, (N, K), dtype)
        RS = T.match_buffer(read_slots, (N, K), "int32")
        R = T.match_buffer(read_weights, (N, K), dtype)
        V = T.match_buffer(values, (N, D), dtype)
        S = T.match_buffer(memory, (N, M, D), dtype)
        Z = T.match_buffer(mass, (N, M), dtype)
        O = T.match_buffer(output, (N, D), dtype)
        for n in heads(N):
            with T.sblock("step"):
                vn = T.axis.spatial(N, n)
                T.reads(
                    WS[vn, 0:K], W[vn, 0:K], RS[vn, 0:K], R[vn, 0:K], V[vn, 0:D], S[vn, 0:M, 0:D], Z[vn, 0:M]
                )  # fmt: skip
                T.writes(O[vn, 0:D], S[vn, 0:M, 0:D], Z[vn, 0:M])
                decays = T.sblock_alloc_buffer((K,), dtype)
                factors = T.sblock_alloc_buffer((K,), dtype)
                _token(workload, schedule, vn, WS, W, RS, R, V, S, Z, O, decays, factors)

    return tvm.s_tir.Schedule(memory_step).mod


def _token(workload: Workload, schedule: MemoryStep, n: Any, WS: Any, W: Any, RS: Any, R: Any, V: Any, S: Any,
           Z: Any, O: Any, decays: Any, factors: Any) -> None:  # fmt: skip
    K, D, dtype, tile, unroll = workload.shape["K"], workload.shape["D"], workload.dtype, schedule.tile, schedule.unroll
    gamma, eps = workload.constants["decay_power"], workload.constants["eps"]

    def write_mass(k: Any) -> None:
        emit.store(decays, [k], emit.decay(W[n, k], gamma, dtype))
        emit.store(Z, [n, WS[n, k]], decays[k] * Z[n, WS[n, k]] + W[n, k])

    def read_mass(k: Any) -> None:
        emit.store(factors, [k], R[n, k] / (Z[n, RS[n, k]] + emit.constant(eps, dtype)))

    emit.each_slot(K, unroll, write_mass)
    emit.each_slot(K, unroll, read_mass)
    with builder.serial(0, D // tile) as q:

        def write_row(k: Any) -> None:
            slot = WS[n, k]
            emit.tiles(S, [n, slot], q * tile, tile, lambda d: decays[k] * S[n, slot, d] + W[n, k] * V[n, d])

        emit.each_slot(K, unroll, write_row)
        emit.sum_slots(
            K,
            unroll,
            lambda k: lambda d: factors[k] * S[n, RS[n, k], d],
            lambda value: emit.tiles(O, [n], q * tile, tile, value),
            lambda d: O[n, d],
        )
