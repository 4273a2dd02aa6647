"""memory_scan_backward in TIR for GPUs, of form "shared": recompute, read gradients, reverse pass, write gradients.

Each program computes its tile's partial dot products of a token's rows; these are summed in the order of the tiles.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import tvm
from tvm.script import tirx as T
from tvm.script.ir_builder import tirx as builder

from lowering import emit
from lowering.gpu.memory_scan.shared.recompute import Recompute
from lowering.gpu.memory_scan.shared.reverse import Reverse
from lowering.gpu.memory_scan.shared.walk import TokenWalk
from lowering.gpu.memory_scan.shared.writes import Writes
from lowering.gpu.threads import Threads
from schedules.gpu.shared import SUM_THREADS, THREADS, SharedScanBackward, history_type
from schedules.workload import Workload


def module(workload: Workload, schedule: SharedScanBackward, cuda: bool, state: str = "float32",
           reverse_threads: bool = False) -> Any:  # fmt: skip
    """Return an IRModule of four kernels that run one after another.

    Slots, weights and their gradients are [N, T, K]. Arrays between the kernels are [N, T', K] in the dtype of sums,
    where T' is T rounded up to whole chunks; partial sums of G tiles (read_parts, write_parts) are [N, G, T', K].

    - ``recompute``: from grad_output [N, T, D], write_slots, write_weights, read_slots, values [N, T, D], memory
      [N, M, D] and mass [N, M] to history [N, T', K, G · tile], the rows before each write, and read_parts, old_masses
      and inverses.
    - ``reads``: from read_parts, read_weights and inverses to grad_read_weights and pushes, the gradients of the mass
      at each read.
    - ``reverse``: from grad_output, grad_memory [N, M, D], grad_mass [N, M], slots, weights, values, history,
      old_masses, inverses and pushes to grad_values, write_parts, and the gradients of the initial memory and mass.
    - ``writes``: from write_parts to grad_write_weights.
    """
    sizes = _Sizes(workload, schedule, state)

    def threads(count: int) -> Threads:
        return Threads(count, cuda, reverse_threads)

    return tvm.IRModule(
        {
            "recompute": _recompute(sizes, threads(THREADS)),
            "reads": _reads(sizes, threads(SUM_THREADS)),
            "reverse": _reverse(sizes, threads(THREADS)),
            "writes": _writes(sizes, threads(SUM_THREADS)),
        }
    )


class _Sizes:
    """The sizes of the kernels, and the dtypes of inputs, ``state``, sums and history."""

    def __init__(self, workload: Workload, schedule: SharedScanBackward, state: str) -> None:
        self.workload, self.schedule = workload, schedule
        self.K, self.M, self.D = (workload.shape[axis] for axis in "KMD")
        self.tiles, self.width = schedule.tiles(workload), schedule.tiles(workload) * schedule.tile
        self.dtype, self.state, self.sums = workload.dtype, state, emit.sum_type(workload.dtype)
        self.history = history_type(workload)

    def walk(self, threads: Threads, n: Any, g: Any, tokens: Any) -> TokenWalk:
        return TokenWalk(self.workload, self.schedule, threads, n, g, tokens)


def _recompute(sizes: _Sizes, threads: Threads) -> Any:
    K, M, D, count, width, cuda = sizes.K, sizes.M, sizes.D, sizes.tiles, sizes.width, threads.cuda
    dtype, state, sums, kept = sizes.dtype, sizes.state, sizes.sums, sizes.history

    @T.prim_func(s_tir=True)
    def recompute(
        grad_output: T.handle, write_slots: T.handle, write_weights: T.handle, read_slots: T.handle,
        values: T.handle, memory: T.handle, mass: T.handle,
        history: T.handle, read_parts: T.handle, old_masses: T.handle, inverses: T.handle,
    ):  # fmt: skip
        T.func_attr({"global_symbol": "recompute", "tir.noalias": True})
        N = T.int64()
        L = T.int64()
        LP = T.int64()
        dO = emit.argument(grad_output, (N, L, D), dtype)
        WS = emit.argument(write_slots, (N, L, K), "int32")
        W = emit.argument(write_weights, (N, L, K), dtype)
        RS = emit.argument(read_slots, (N, L, K), "int32")
        V = emit.argument(values, (N, L, D), dtype)
        S0 = emit.argument(memory, (N, M, D), state)
        Z0 = emit.argument(mass, (N, M), state)
        H = emit.argument(history, (N, LP, K, width), kept)
        PR = emit.argument(read_parts, (N, count, LP, K), sums)
        Z, I = emit.arguments((old_masses, inverses), (N, LP, K), sums)
        for n in T.thread_binding(N, thread="blockIdx.y") if cuda else T.parallel(N):
            for g in T.thread_binding(count, thread="blockIdx.x") if cuda else T.serial(count):
                with T.sblock("recompute"):
                    vn, vg = T.axis.remap("SS", [n, g])
                    T.reads(dO[vn, 0:L, 0:D], WS[vn, 0:L, 0:K], W[vn, 0:L, 0:K], RS[vn, 0:L, 0:K], V[vn, 0:L, 0:D],
                            S0[vn, 0:M, 0:D], Z0[vn, 0:M])  # fmt: skip
                    T.writes(H[vn, 0:LP, 0:K, 0:width], PR[vn, vg, 0:LP, 0:K], Z[vn, 0:LP, 0:K], I[vn, 0:LP, 0:K])
                    _recompute_walk(sizes.walk(threads, vn, vg, L), WS, W, V, RS, dO, (H, PR, Z, I)).emit(S0, Z0)

    return threads.bound(recompute, ordered=True)


def _recompute_walk(walk: TokenWalk, WS: Any, W: Any, V: Any, RS: Any, dO: Any, outputs: tuple[Any, ...]) -> Recompute:
    return Recompute(walk, Writes(walk, WS, W, V), RS, dO, outputs)


def _reverse(sizes: _Sizes, threads: Threads) -> Any:
    K, M, D, count, width, cuda = sizes.K, sizes.M, sizes.D, sizes.tiles, sizes.width, threads.cuda
    dtype, state, sums, kept = sizes.dtype, sizes.state, sizes.sums, sizes.history

    @T.prim_func(s_tir=True)
    def reverse(
        grad_output: T.handle, grad_memory: T.handle, grad_mass: T.handle, write_slots: T.handle,
        write_weights: T.handle, read_slots: T.handle, read_weights: T.handle, values: T.handle, history: T.handle,
        old_masses: T.handle, inverses: T.handle, pushes: T.handle,
        grad_values: T.handle, write_parts: T.handle, grad_first_memory: T.handle, grad_first_mass: T.handle,
    ):  # fmt: skip
        T.func_attr({"global_symbol": "reverse", "tir.noalias": True})
        N = T.int64()
        L = T.int64()
        LP = T.int64()
        dO = emit.argument(grad_output, (N, L, D), dtype)
        dS1 = emit.argument(grad_memory, (N, M, D), state)
        dZ1 = emit.argument(grad_mass, (N, M), state)
        WS, W, RS, R = emit.accesses((write_slots, write_weights, read_slots, read_weights), (N, L, K), dtype)
        V = emit.argument(values, (N, L, D), dtype)
        H = emit.argument(history, (N, LP, K, width), kept)
        Z, I, P = emit.arguments((old_masses, inverses, pushes), (N, LP, K), sums)
        dV = emit.argument(grad_values, (N, L, D), dtype)
        PW = emit.argument(write_parts, (N, count, LP, K), sums)
        dS = emit.argument(grad_first_memory, (N, M, D), state)
        dZ = emit.argument(grad_first_mass, (N, M), state)
        for n in T.thread_binding(N, thread="blockIdx.y") if cuda else T.parallel(N):
            for g in T.thread_binding(count, thread="blockIdx.x") if cuda else T.serial(count):
                with T.sblock("reverse"):
                    vn, vg = T.axis.remap("SS", [n, g])
                    T.reads(dO[vn, 0:L, 0:D], dS1[vn, 0:M, 0:D], dZ1[vn, 0:M], WS[vn, 0:L, 0:K], W[vn, 0:L, 0:K],
                            RS[vn, 0:L, 0:K], R[vn, 0:L, 0:K], V[vn, 0:L, 0:D], H[vn, 0:LP, 0:K, 0:width],
                            Z[vn, 0:LP, 0:K], I[vn, 0:LP, 0:K], P[vn, 0:LP, 0:K])  # fmt: skip
                    T.writes(dV[vn, 0:L, 0:D], PW[vn, vg, 0:LP, 0:K], dS[vn, 0:M, 0:D], dZ[vn, 0:M])
                    Reverse(sizes.walk(threads, vn, vg, L), (WS, W, Z, RS, R, I, P), (dO, V), H, PW, dV).emit(
                        dS1, dZ1, dS, dZ
                    )

    return threads.bound(reverse, ordered=True)


def _reads(sizes: _Sizes, threads: Threads) -> Any:
    K, dtype, sums, count, cuda = sizes.K, sizes.dtype, sizes.sums, sizes.tiles, threads.cuda

    @T.prim_func(s_tir=True)
    def reads(
        read_parts: T.handle, read_weights: T.handle, inverses: T.handle, grad_read_weights: T.handle, pushes: T.handle
    ):
        T.func_attr({"global_symbol": "reads", "tir.noalias": True})
        N = T.int64()
        L = T.int64()
        LP = T.int64()
        PR = emit.argument(read_parts, (N, count, LP, K), sums)
        R = emit.argument(read_weights, (N, L, K), dtype)
        I = emit.argument(inverses, (N, LP, K), sums)
        dR = emit.argument(grad_read_weights, (N, L, K), dtype)
        P = emit.argument(pushes, (N, LP, K), sums)
        for n in T.thread_binding(N, thread="blockIdx.y") if cuda else T.parallel(N):
            for b in T.thread_binding(_blocks(L * K), thread="blockIdx.x") if cuda else T.serial(_blocks(L * K)):
                with T.sblock("reads"):
                    vn, vb = T.axis.remap("SS", [n, b])
                    T.reads(PR[vn, 0:count, 0:LP, 0:K], R[vn, 0:L, 0:K], I[vn, 0:LP, 0:K])
                    T.writes(dR[vn, 0:L, 0:K], P[vn, 0:LP, 0:K])
                    _sum(threads, vn, vb, L, PR, lambda at, dot: _read(at, dot, R, I, dR, P))

    return threads.bound(reads)


def _read(at: list[Any], dot: Any, R: Any, I: Any, dR: Any, P: Any) -> None:
    inverse = I[tuple(at)]
    emit.store(dR, at, (dot * inverse).astype(str(dR.dtype)))
    emit.store(P, at, dot * inverse * R[tuple(at)].astype(str(P.dtype)) * inverse)


def _writes(sizes: _Sizes, threads: Threads) -> Any:
    K, dtype, sums, count, cuda = sizes.K, sizes.dtype, sizes.sums, sizes.tiles, threads.cuda

    @T.prim_func(s_tir=True)
    def writes(write_parts: T.handle, grad_write_weights: T.handle):
        T.func_attr({"global_symbol": "writes", "tir.noalias": True})
        N = T.int64()
        L = T.int64()
        LP = T.int64()
        PW = emit.argument(write_parts, (N, count, LP, K), sums)
        dW = emit.argument(grad_write_weights, (N, L, K), dtype)
        for n in T.thread_binding(N, thread="blockIdx.y") if cuda else T.parallel(N):
            for b in T.thread_binding(_blocks(L * K), thread="blockIdx.x") if cuda else T.serial(_blocks(L * K)):
                with T.sblock("writes"):
                    vn, vb = T.axis.remap("SS", [n, b])
                    T.reads(PW[vn, 0:count, 0:LP, 0:K])
                    T.writes(dW[vn, 0:L, 0:K])
                    _sum(threads, vn, vb, L, PW, lambda at, dot: emit.store(dW, at, dot.astype(dtype)))

    return threads.bound(writes)


def _blocks(items: Any) -> Any:
    """Return the number of programs that sum ``items``, one in each thread."""
    return (items + SUM_THREADS - 1) // SUM_THREADS


def _sum(threads: Threads, n: Any, block: Any, tokens: Any, parts: Any, give: Callable[[list[Any], Any], None]) -> None:
    """Emit ``give([n, t, k], sum)`` with the sum over the tiles of head ``n``, for the thread's item of the block."""
    count, K = int(parts.shape[1]), int(parts.shape[3])

    def one(thread: Any) -> None:
        e = block * SUM_THREADS + thread
        with builder.If(e < tokens * K), builder.Then():
            t, k = e // K, e % K
            total = emit.registers(threads.cuda, 1, str(parts.dtype))
            emit.store(total, [0], parts[n, 0, t, k])
            for g in range(1, count):
                emit.store(total, [0], total[0] + parts[n, g, t, k])
            give([n, t, k], total[0])

    with threads.program():
        threads.each(one)
