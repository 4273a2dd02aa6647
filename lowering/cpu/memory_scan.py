"""memory_scan in TIR: a parallel loop over heads and groups of channels, each of which scans the tokens in order."""

from __future__ import annotations

from typing import Any

import tvm
from tvm.script import tirx as T
from tvm.script.ir_builder import tirx as builder

from lowering import emit
from ramnet.ops.accesses import Accesses
from schedules.cpu import MemoryScan
from schedules.workload import Workload


def module(workload: Workload, schedule: MemoryScan) -> Any:
    """Return the kernel's IRModule.

    Its parameters are write_slots, write_weights, read_slots, read_weights [N, T, K], values [N, T, D], memory
    [N, M, D], mass [N, M], and the outputs output [N, T, D], new memory and new mass. N and T are dynamic.

    The kernel raises RuntimeError (``emit.OUT_OF_RANGE``) for a slot outside 0..M-1, without accessing its memory.
    """
    K, M, D = (workload.shape[axis] for axis in "KMD")
    dtype = workload.dtype
    groups, chunk = schedule.groups, schedule.chunk
    width = D // groups

    @T.prim_func(s_tir=True)
    def memory_scan(  # noqa: PLR0913 - the buffers of the kernel
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
        outside = T.sblock_alloc_buffer((N,), "int32")  # whether any of a head's slots is out of range
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
                    tokens = T.meta_var(_Chunk(workload, schedule, vn, c, L))
                    if tokens.in_range(WS, RS):
                        tokens.mass(Accesses(WS, W, RS, R), z, decays, factors)
                        for q in T.serial(width // schedule.tile):
                            tokens.tile(
                                vg * width + q * schedule.tile, Accesses(WS, W, RS, R), V, decays, factors, S, O
                            )
                    else:
                        outside[vn] = 1
                if vg == 0:
                    for i in T.serial(M):
                        Z[vn, i] = z[i]
        emit.refuse_any(outside, N)

    return tvm.IRModule({"memory_scan": memory_scan})


class _Chunk:
    """Emits the scan of chunk ``c`` of head ``n``; the head has ``tokens`` tokens in all."""

    def __init__(self, workload: Workload, schedule: MemoryScan, n: Any, c: Any, tokens: Any) -> None:
        self.workload, self.unroll, self.width, self.n = workload, schedule.unroll, schedule.tile, n
        self.top_k, self.first = workload.shape["K"], c * schedule.chunk
        # The last chunk may be shorter.
        self.count = tvm.tirx.min(tvm.tirx.const(schedule.chunk, "int32"), tokens - self.first)

    def in_range(self, WS: Any, RS: Any) -> Any:
        """Return whether the chunk's slots are in 0..M-1."""
        M = self.workload.shape["M"]
        return emit.slots_in_range((WS, RS), self.count, self.top_k, M, lambda i: [self.n, self.first + i])

    def mass(self, accesses: Accesses, z: Any, decays: Any, factors: Any) -> None:
        """Emit the decays (1 − w)^γ, the mass updates, and the factor of each read, r / (z + ε) (paper, steps 5, 6)."""
        (WS, W, RS, R), K, n, dtype = accesses, self.top_k, self.n, self.workload.dtype
        gamma, eps = self.workload.constants["decay_power"], self.workload.constants["eps"]
        with builder.serial(0, self.count) as i:
            emit.row(decays, [i], K, lambda k: emit.decay(W[n, self.first + i, k], gamma, dtype))
        with builder.serial(0, self.count) as i:
            t = self.first + i

            def write(k: Any) -> None:
                slot = WS[n, t, k]
                emit.store(z, [slot], decays[i, k] * z[slot] + W[n, t, k])

            emit.each_slot(K, self.unroll, write)
            emit.each_slot(K, self.unroll, lambda k: emit.store(factors, [i, k], z[RS[n, t, k]]))
        # A separate loop for the divisions can be vectorised: 1.41 ms instead of 1.56 ms, best of 80.
        with builder.serial(0, self.count) as i:
            emit.row(factors, [i], K, lambda k: R[n, self.first + i, k] / (factors[i, k] + emit.constant(eps, dtype)))

    def tile(self, start: Any, accesses: Accesses, V: Any, decays: Any, factors: Any, S: Any, O: Any) -> None:
        """Emit the scan of the tile of channels from ``start``: each token writes K rows, then reads K rows."""
        (WS, W, RS, _), K, n, tile = accesses, self.top_k, self.n, self.width
        with builder.serial(0, self.count) as i:
            t = self.first + i

            def write(k: Any) -> None:
                slot = WS[n, t, k]
                emit.tiles(S, [n, slot], start, tile, lambda d: decays[i, k] * S[n, slot, d] + W[n, t, k] * V[n, t, d])

            emit.each_slot(K, self.unroll, write)
            emit.sum_slots(
                K,
                self.unroll,
                lambda k: lambda d: factors[i, k] * S[n, RS[n, t, k], d],
                lambda value: emit.tiles(O, [n, t], start, tile, value),
                lambda d: O[n, t, d],
            )
