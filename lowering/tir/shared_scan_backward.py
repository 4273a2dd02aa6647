"""memory_scan_backward in TIR for GPUs: the mass forward, the state's part, and the gradients of the weights.

A program of the state's part gives its share of each weight's dot products, which ``shared_mass`` sums in one order.
"""

from __future__ import annotations

from typing import Any

import tvm
from tvm.script import tirx as T

from lowering.tir import emit, shared_mass
from lowering.tir.shared_rows import Rows
from lowering.tir.threads import Threads
from schedules.gpu.scan import MemoryScanBackward
from schedules.workload import Workload


def module(workload: Workload, schedule: MemoryScanBackward, cuda: bool, state: str = "float32",
           backwards: bool = False) -> Any:  # fmt: skip
    """The IRModule of three kernels that run one after another: ``mass``, ``state`` and ``weights``.

    ``state`` takes grad_output [N, T, D], grad_memory [N, M, D], write_slots, write_weights, read_slots, read_weights
    [N, T, K], values [N, T, D], memory [N, M, D], and ``inverses`` [N, T, K] of ``mass``; scratch checkpoints
    [N, G, C, M, tile] and history [N, G, checkpoint, K, tile] for G tiles and C segments; and gives the gradients of
    values and memory, and write_parts, read_parts [N, G, T, K] for ``weights``. Scratch has the type of sums.
    """
    functions = shared_mass.functions(workload, schedule, cuda, state, backwards)
    return tvm.IRModule({**functions, "state": _state(workload, schedule, cuda, state, backwards)})


def _state(workload: Workload, schedule: MemoryScanBackward, cuda: bool, state: str, backwards: bool) -> Any:
    K, M, D = (workload.shape[axis] for axis in "KMD")
    dtype, sums, tile = workload.dtype, emit.sum_type(workload.dtype), schedule.tile
    threads = Threads(tile * schedule.slot_lanes, cuda, backwards)
    tiles = -(-D // tile)

    @T.prim_func(s_tir=True)
    def scan_backward(
        grad_output: T.handle, grad_memory: T.handle, write_slots: T.handle, write_weights: T.handle,
        read_slots: T.handle, read_weights: T.handle, values: T.handle, memory: T.handle, inverses: T.handle,
        checkpoints: T.handle, history: T.handle,
        grad_values: T.handle, grad_first_memory: T.handle, write_parts: T.handle, read_parts: T.handle,
    ):  # fmt: skip
        T.func_attr({"global_symbol": "state", "tir.noalias": True})
        N = T.int64()
        L = T.int64()
        C = T.int64()
        dO = T.match_buffer(grad_output, (N, L, D), dtype)
        dS1 = T.match_buffer(grad_memory, (N, M, D), state)
        WS = T.match_buffer(write_slots, (N, L, K), "int32")
        W = T.match_buffer(write_weights, (N, L, K), dtype)
        RS = T.match_buffer(read_slots, (N, L, K), "int32")
        R = T.match_buffer(read_weights, (N, L, K), dtype)
        V = T.match_buffer(values, (N, L, D), dtype)
        S0 = T.match_buffer(memory, (N, M, D), state)
        I = T.match_buffer(inverses, (N, L, K), sums)
        CP = T.match_buffer(checkpoints, (N, tiles, C, M, tile), sums)
        H = T.match_buffer(history, (N, tiles, schedule.checkpoint, K, tile), sums)
        dV = T.match_buffer(grad_values, (N, L, D), dtype)
        dS = T.match_buffer(grad_first_memory, (N, M, D), state)
        PW = T.match_buffer(write_parts, (N, tiles, L, K), sums)
        PR = T.match_buffer(read_parts, (N, tiles, L, K), sums)
        for n in T.thread_binding(N, thread="blockIdx.x") if cuda else T.parallel(N):
            for g in T.thread_binding(tiles, thread="blockIdx.y") if cuda else T.serial(tiles):
                with T.sblock("scan"):
                    vn, vg = T.axis.remap("SS", [n, g])
                    T.reads(dO[vn, 0:L, 0:D], dS1[vn, 0:M, 0:D], WS[vn, 0:L, 0:K], W[vn, 0:L, 0:K], RS[vn, 0:L, 0:K],
                            R[vn, 0:L, 0:K], V[vn, 0:L, 0:D], S0[vn, 0:M, 0:D], I[vn, 0:L, 0:K])  # fmt: skip
                    T.writes(dV[vn, 0:L, 0:D], dS[vn, 0:M, 0:D], PW[vn, vg, 0:L, 0:K], PR[vn, vg, 0:L, 0:K],
                             CP[vn, vg, 0:C, 0:M, 0:tile], H[vn, vg, 0 : schedule.checkpoint, 0:K, 0:tile])  # fmt: skip
                    Rows(workload, schedule, threads, (vn, vg), (L, C), (dO, WS, W, RS, R, V, I), (CP, H)).emit(
                        S0, dS1, dV, dS, PW, PR
                    )

    return threads.bound(scan_backward)
