"""The mass's part of memory_scan_backward in TIR for GPUs: forward before the state's part, and back after it.

A program owns a head, its mass in shared memory, and a thread one of the K slots of a token.
"""

from __future__ import annotations

from typing import Any

from tvm.script import tirx as T
from tvm.script.ir_builder import tirx as builder

from lowering.tir import emit
from lowering.tir.threads import WARP, Threads, chosen
from schedules.gpu.scan import MemoryScanBackward
from schedules.workload import Workload


def functions(
    workload: Workload, schedule: MemoryScanBackward, cuda: bool, state: str, backwards: bool
) -> dict[str, Any]:
    """``mass`` takes write_slots, write_weights, read_slots [N, T, K], mass [N, M], and gives masses [N, T, K], the z
    before each write, and inverses [N, T, K], 1 / (z + ε) at each read.

    ``weights`` takes write_slots, write_weights, read_slots, read_weights, masses, inverses [N, T, K], the tiles'
    write_parts and read_parts [N, G, T, K], grad_mass [N, M], and gives the gradients of the write and read weights
    [N, T, K] and of the mass [N, M].
    """
    K, M, D = (workload.shape[axis] for axis in "KMD")
    dtype, sums = workload.dtype, emit.sum_type(workload.dtype)
    tiles = -(-D // schedule.tile)
    forth, back_again = (Threads(WARP, cuda, backwards) for _ in range(2))

    @T.prim_func(s_tir=True)
    def forward(
        write_slots: T.handle, write_weights: T.handle, read_slots: T.handle, mass: T.handle,
        masses: T.handle, inverses: T.handle,
    ):  # fmt: skip
        T.func_attr({"global_symbol": "mass", "tir.noalias": True})
        N = T.int64()
        L = T.int64()
        WS = T.match_buffer(write_slots, (N, L, K), "int32")
        W = T.match_buffer(write_weights, (N, L, K), dtype)
        RS = T.match_buffer(read_slots, (N, L, K), "int32")
        Z0 = T.match_buffer(mass, (N, M), state)
        Z = T.match_buffer(masses, (N, L, K), sums)
        I = T.match_buffer(inverses, (N, L, K), sums)
        for n in T.thread_binding(N, thread="blockIdx.x") if cuda else T.parallel(N):
            with T.sblock("mass"):
                vn = T.axis.spatial(N, n)
                T.reads(WS[vn, 0:L, 0:K], W[vn, 0:L, 0:K], RS[vn, 0:L, 0:K], Z0[vn, 0:M])
                T.writes(Z[vn, 0:L, 0:K], I[vn, 0:L, 0:K])
                _Program(workload, schedule.chunk, forth, vn, L).forward(WS, W, RS, Z0, Z, I)

    @T.prim_func(s_tir=True)
    def back(
        write_slots: T.handle, write_weights: T.handle, read_slots: T.handle, read_weights: T.handle,
        masses: T.handle, inverses: T.handle, write_parts: T.handle, read_parts: T.handle, grad_mass: T.handle,
        grad_write_weights: T.handle, grad_read_weights: T.handle, grad_first_mass: T.handle,
    ):  # fmt: skip
        T.func_attr({"global_symbol": "weights", "tir.noalias": True})
        N = T.int64()
        L = T.int64()
        WS = T.match_buffer(write_slots, (N, L, K), "int32")
        W = T.match_buffer(write_weights, (N, L, K), dtype)
        RS = T.match_buffer(read_slots, (N, L, K), "int32")
        R = T.match_buffer(read_weights, (N, L, K), dtype)
        Z = T.match_buffer(masses, (N, L, K), sums)
        I = T.match_buffer(inverses, (N, L, K), sums)
        PW = T.match_buffer(write_parts, (N, tiles, L, K), sums)
        PR = T.match_buffer(read_parts, (N, tiles, L, K), sums)
        dZ1 = T.match_buffer(grad_mass, (N, M), state)
        dW = T.match_buffer(grad_write_weights, (N, L, K), dtype)
        dR = T.match_buffer(grad_read_weights, (N, L, K), dtype)
        dZ = T.match_buffer(grad_first_mass, (N, M), state)
        for n in T.thread_binding(N, thread="blockIdx.x") if cuda else T.parallel(N):
            with T.sblock("weights"):
                vn = T.axis.spatial(N, n)
                T.reads(
                    WS[vn, 0:L, 0:K], W[vn, 0:L, 0:K], RS[vn, 0:L, 0:K], R[vn, 0:L, 0:K], Z[vn, 0:L, 0:K],
                    I[vn, 0:L, 0:K], PW[vn, 0:tiles, 0:L, 0:K], PR[vn, 0:tiles, 0:L, 0:K], dZ1[vn, 0:M],
                )  # fmt: skip
                T.writes(dW[vn, 0:L, 0:K], dR[vn, 0:L, 0:K], dZ[vn, 0:M])
                _Program(workload, schedule.chunk, back_again, vn, L).back(
                    (WS, W, RS, R, Z, I, PW, PR), tiles, dZ1, dW, dR, dZ
                )

    return {"mass": forth.bound(forward), "weights": back_again.bound(back)}


class _Program:
    """Emits one program: head ``n``, ``tokens`` long."""

    def __init__(self, workload: Workload, chunk: int, threads: Threads, n: Any, tokens: Any) -> None:
        self.K, self.M = workload.shape["K"], workload.shape["M"]
        self.constants, self.dtype, self.sums = workload.constants, workload.dtype, emit.sum_type(workload.dtype)
        self.threads, self.chunk, self.n, self.tokens = threads, chunk, n, tokens
        self.chunks = (tokens + chunk - 1) // chunk
        self.z = threads.shared((self.M,), self.sums)
        self.write_slots, self.read_slots = (threads.shared((chunk, self.K), "int32") for _ in range(2))

    def operands(self, count: int) -> list[Any]:
        return [self.threads.shared((self.chunk, self.K), self.sums) for _ in range(count)]

    def load_slots(self, i: Any, k: Any, t: Any, WS: Any, RS: Any) -> None:
        """Tokens past the end have slots of their own, where they change nothing."""
        emit.store(self.write_slots, [i, k], chosen(t < self.tokens, WS[self.n, t, k], k))
        emit.store(self.read_slots, [i, k], chosen(t < self.tokens, RS[self.n, t, k], k))

    def forward(self, WS: Any, W: Any, RS: Any, Z0: Any, Z: Any, I: Any) -> None:
        threads, chunk, K, sums = self.threads, self.chunk, self.K, self.sums
        weights, decays = self.operands(2)
        eps, gamma = emit.constant(self.constants["eps"], sums), self.constants["decay_power"]

        def load(c: Any, e: Any) -> None:
            i, k = e // K, e % K
            t = c * chunk + i
            self.load_slots(i, k, t, WS, RS)
            weight = chosen(t < self.tokens, W[self.n, t, k].astype(sums), emit.constant(0, sums))
            emit.store(weights, [i, k], weight)
            emit.store(decays, [i, k], emit.decay(weights[i, k], gamma, sums))

        def write(i: Any, t: Any, k: Any) -> None:
            slot = self.write_slots[i, k]
            with builder.If(t < self.tokens), builder.Then():
                emit.store(Z, [self.n, t, k], self.z[slot])
            emit.store(self.z, [slot], decays[i, k] * self.z[slot] + weights[i, k])

        def read(i: Any, t: Any, k: Any) -> None:
            with builder.If(t < self.tokens), builder.Then():
                emit.store(I, [self.n, t, k], emit.constant(1, sums) / (self.z[self.read_slots[i, k]] + eps))

        with threads.program():
            threads.spread(self.M, lambda m: emit.store(self.z, [m], Z0[self.n, m].astype(sums)))
            with builder.serial(0, self.chunks) as c:
                threads.spread(chunk * K, lambda e: load(c, e))
                threads.barrier()
                with builder.serial(0, chunk) as i:
                    threads.share(K, lambda k, *_: write(i, c * chunk + i, k))
                    threads.barrier()
                    threads.share(K, lambda k, *_: read(i, c * chunk + i, k))
                    threads.barrier()

    def back(self, inputs: tuple[Any, ...], tiles: int, dZ1: Any, dW: Any, dR: Any, dZ: Any) -> None:
        WS, W, RS, R, Z, I, PW, PR = inputs
        threads, chunk, K, sums = self.threads, self.chunk, self.K, self.sums
        decays, dots, through, pushes = self.operands(4)
        gamma, proxy_eps = self.constants["decay_power"], self.constants["proxy_eps"]
        zero, one = emit.constant(0, sums), emit.constant(1, sums)

        def sum_of_tiles(parts: Any, t: Any, k: Any) -> Any:
            total = emit.registers(threads.cuda, 1, sums)
            emit.store(total, [0], parts[self.n, 0, t, k])
            if tiles > 1:
                with builder.serial(1, tiles) as g:
                    emit.store(total, [0], total[0] + parts[self.n, g, t, k])
            return total[0]

        def load(c: Any, e: Any) -> None:
            i, k = e // K, e % K
            t = c * chunk + i
            self.load_slots(i, k, t, WS, RS)
            weight = chosen(t < self.tokens, W[self.n, t, k].astype(sums), zero)
            emit.store(decays, [i, k], emit.decay(weight, gamma, sums))
            emit.store(dots, [i, k], zero)
            emit.store(through, [i, k], zero)
            emit.store(pushes, [i, k], zero)
            with builder.If(t < self.tokens), builder.Then():
                emit.store(dots, [i, k], sum_of_tiles(PW, t, k))
                inside = W[self.n, t, k].astype(sums)
                slope = emit.decay_slope(inside, gamma, proxy_eps, sums)
                emit.store(through, [i, k], one + slope * Z[self.n, t, k])
                pull = sum_of_tiles(PR, t, k) * I[self.n, t, k]
                emit.store(dR, [self.n, t, k], pull.astype(self.dtype))
                emit.store(pushes, [i, k], pull * R[self.n, t, k].astype(sums) * I[self.n, t, k])

        def read(i: Any, k: Any) -> None:
            slot = self.read_slots[i, k]
            emit.store(self.z, [slot], self.z[slot] - pushes[i, k])

        def write(i: Any, t: Any, k: Any) -> None:
            slot = self.write_slots[i, k]
            with builder.If(t < self.tokens), builder.Then():
                gradient = dots[i, k] + self.z[slot] * through[i, k]
                emit.store(dW, [self.n, t, k], gradient.astype(self.dtype))
            emit.store(self.z, [slot], decays[i, k] * self.z[slot])

        with threads.program():
            threads.spread(self.M, lambda m: emit.store(self.z, [m], dZ1[self.n, m].astype(sums)))
            with builder.serial(0, self.chunks) as later:
                c = self.chunks - 1 - later
                threads.spread(chunk * K, lambda e: load(c, e))
                threads.barrier()
                with builder.serial(0, chunk) as rest:
                    i = chunk - 1 - rest
                    threads.share(K, lambda k, *_: read(i, k))
                    threads.barrier()
                    threads.share(K, lambda k, *_: write(i, c * chunk + i, k))
                    threads.barrier()
            threads.barrier()
            threads.spread(self.M, lambda m: emit.store(dZ, [self.n, m], self.z[m].astype(dZ.dtype)))
