"""memory_scan in TIR for GPUs, of form "shared": a warp scans a head's tokens with the state in shared memory."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import tvm
import tvm.tirx as tir
from tvm.script import tirx as T
from tvm.script.ir_builder import tirx as builder

from lowering import emit
from lowering.gpu.memory_scan.shared.walk import TokenWalk
from lowering.gpu.memory_scan.shared.writes import Writes
from lowering.gpu.threads import Threads
from schedules.gpu.shared import THREADS, SharedScan
from schedules.workload import Workload


def module(
    workload: Workload, schedule: SharedScan, cuda: bool, state: str = "float32", reverse_threads: bool = False
) -> Any:
    """Return the kernel's IRModule, with its programs bound to blocks of a GPU or run in parallel on a CPU.

    Its parameters are write_slots, write_weights, read_slots, read_weights [N, T, K], values [N, T, D], memory
    [N, M, D], mass [N, M], and the outputs output [N, T, D], new memory and new mass. N and T are dynamic; memory and
    mass have the dtype ``state``.
    """
    K, M, D = (workload.shape[axis] for axis in "KMD")
    dtype, count = workload.dtype, schedule.tiles(workload)
    threads = Threads(THREADS, cuda, reverse_threads)

    @T.prim_func(s_tir=True)
    def memory_scan(
        write_slots: T.handle, write_weights: T.handle, read_slots: T.handle, read_weights: T.handle,
        values: T.handle, memory: T.handle, mass: T.handle,
        output: T.handle, new_memory: T.handle, new_mass: T.handle,
    ):  # fmt: skip
        T.func_attr({"global_symbol": "memory_scan", "tir.noalias": True})
        N = T.int64()
        L = T.int64()
        WS, W, RS, R = emit.accesses((write_slots, write_weights, read_slots, read_weights), (N, L, K), dtype)
        V = emit.argument(values, (N, L, D), dtype)
        S0 = emit.argument(memory, (N, M, D), state)
        Z0 = emit.argument(mass, (N, M), state)
        O = emit.argument(output, (N, L, D), dtype)
        S = emit.argument(new_memory, (N, M, D), state)
        Z = emit.argument(new_mass, (N, M), state)
        for n in T.thread_binding(N, thread="blockIdx.y") if cuda else T.parallel(N):
            for g in T.thread_binding(count, thread="blockIdx.x") if cuda else T.serial(count):
                with T.sblock("scan"):
                    vn, vg = T.axis.remap("SS", [n, g])
                    T.reads(WS[vn, 0:L, 0:K], W[vn, 0:L, 0:K], RS[vn, 0:L, 0:K], R[vn, 0:L, 0:K], V[vn, 0:L, 0:D],
                            S0[vn, 0:M, 0:D], Z0[vn, 0:M])  # fmt: skip
                    T.writes(O[vn, 0:L, 0:D], S[vn, 0:M, 0:D], Z[vn, 0:M])
                    _program(TokenWalk(workload, schedule, threads, vn, vg, L), (WS, W, RS, R, V), O).emit(S0, Z0, S, Z)

    return tvm.IRModule({"memory_scan": threads.bound(memory_scan, ordered=True)})


def _program(walk: TokenWalk, inputs: tuple[Any, ...], O: Any) -> _Tokens:
    WS, W, RS, R, V = inputs
    return _Tokens(walk, Writes(walk, WS, W, V), RS, R, O)


class _Tokens:
    """Emits a program's scan of the tokens."""

    def __init__(self, walk: TokenWalk, writes: Writes, RS: Any, R: Any, O: Any) -> None:
        self.walk, self.writes, self.output = walk, writes, O
        self.slots, self.weights = walk.by_slot(RS, R)
        self.totals = walk.threads.private(walk.straight * walk.channels, walk.sums)

    def emit(self, S0: Any, Z0: Any, S: Any, Z: Any) -> None:
        walk = self.walk
        with walk.threads.program():
            walk.fill(S0, Z0)
            walk.go([(self.writes.operands, self.writes.work()), ((self.slots, self.weights), self.read)], self.give)
            walk.give_rows(S)
            with builder.If(walk.g == 0), builder.Then():
                walk.give_mass(Z)

    def read(self, thread: Any, turn: int, t: Any, ahead: Callable[[], None]) -> None:
        """Emit the thread's part of a token's output: its slots' rows times r / (z + ε)."""
        walk, each = self.walk, range(self.walk.width)
        eps = emit.constant(walk.constants["eps"], walk.sums)
        slots = [self.slots.get(thread, turn, j) for j in each]
        rows, masses = [walk.row(thread, slot) for slot in slots], walk.masses(slots)
        factors = emit.registers(walk.threads.cuda, walk.width, walk.sums)
        ahead()
        for j in each:
            weight = self.weights.get(thread, turn, j)
            emit.store(factors, [j], walk.threads.quotient(weight, masses[j] + eps, walk.sums))
        for c in range(walk.channels):
            total = factors[0] * rows[0][c]
            for j in each[1:]:
                total = total + factors[j] * rows[j][c]
            self.totals.store(thread, turn * walk.channels + c, total)

    def give(self, first: Any) -> None:
        """Emit the sums over lanes of the unrolled tokens from ``first``, and store them in the output."""
        walk = self.walk

        def store(thread: Any, place: Any, size: int, value: Callable[[int], Any]) -> None:
            t, d = first + place // walk.channels, walk.channel(thread) + place % walk.channels
            with builder.If(tir.all(t < walk.tokens, d < walk.D)), builder.Then():
                emit.put(walk.threads.cuda, self.output, [walk.n, t, d], size, value)

        walk.fold(self.totals, walk.straight * walk.channels, walk.lane_strides, walk.channels, store)
