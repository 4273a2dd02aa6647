"""memory_scan in TIR for GPUs, serial in time: a program owns a head and a tile of channels, their state in shared
memory.

Thread (lane, channel) works on the channel's part of a few of a token's K slots, so with one lane it owns its column.
Two things run one chunk of tokens apart in the same phases, so that neither waits for the other: the state of a chunk,
and the mass of the next one, of which a thread takes a slot. The chunk after that is on its way from global memory in
registers. Tokens past the end write nothing: their weights are 0 and their decays 1.
"""

from __future__ import annotations

from typing import Any

import tvm
from tvm.script import tirx as T
from tvm.script.ir_builder import tirx as builder

from lowering.tir import emit
from lowering.tir.threads import WARP, Threads, chosen
from schedules.gpu.scan import MemoryScan
from schedules.gpu.shared import UNROLL
from schedules.workload import Workload


def module(
    workload: Workload, schedule: MemoryScan, cuda: bool, state: str = "float32", backwards: bool = False
) -> Any:
    """The IRModule of the kernel, with its programs bound to blocks of a GPU or run in parallel on a CPU.

    Parameters: write_slots, write_weights, read_slots, read_weights [N, T, K], values [N, T, D], memory [N, M, D],
    mass [N, M]; output [N, T, D], new memory, new mass. N and T are taken at run time; memory and mass have the type
    ``state``.
    """
    K, M, D = (workload.shape[axis] for axis in "KMD")
    dtype, tile = workload.dtype, schedule.tile
    threads = Threads(tile * schedule.slot_lanes, cuda, backwards)
    tiles = -(-D // tile)

    @T.prim_func(s_tir=True)
    def memory_scan(
        write_slots: T.handle, write_weights: T.handle, read_slots: T.handle, read_weights: T.handle,
        values: T.handle, memory: T.handle, mass: T.handle,
        output: T.handle, new_memory: T.handle, new_mass: T.handle,
    ):  # fmt: skip
        T.func_attr({"global_symbol": "memory_scan", "tir.noalias": True})
        N = T.int64()
        L = T.int64()
        WS = T.match_buffer(write_slots, (N, L, K), "int32")
        W = T.match_buffer(write_weights, (N, L, K), dtype)
        RS = T.match_buffer(read_slots, (N, L, K), "int32")
        R = T.match_buffer(read_weights, (N, L, K), dtype)
        V = T.match_buffer(values, (N, L, D), dtype)
        S0 = T.match_buffer(memory, (N, M, D), state)
        Z0 = T.match_buffer(mass, (N, M), state)
        O = T.match_buffer(output, (N, L, D), dtype)
        S = T.match_buffer(new_memory, (N, M, D), state)
        Z = T.match_buffer(new_mass, (N, M), state)
        for n in T.thread_binding(N, thread="blockIdx.x") if cuda else T.parallel(N):
            for g in T.thread_binding(tiles, thread="blockIdx.y") if cuda else T.serial(tiles):
                with T.sblock("scan"):
                    vn, vg = T.axis.remap("SS", [n, g])
                    T.reads(WS[vn, 0:L, 0:K], W[vn, 0:L, 0:K], RS[vn, 0:L, 0:K], R[vn, 0:L, 0:K], V[vn, 0:L, 0:D],
                            S0[vn, 0:M, 0:D], Z0[vn, 0:M])  # fmt: skip
                    T.writes(O[vn, 0:L, 0:D], S[vn, 0:M, 0:D], Z[vn, 0:M])
                    _Program(workload, schedule, threads, vn, vg, L, (WS, W, RS, R, V)).emit(S0, Z0, O, S, Z)

    return tvm.IRModule({"memory_scan": threads.bound(memory_scan)})


class _Program:
    """Emits one program: head ``n``, the ``g``-th tile of channels, ``tokens`` long."""

    def __init__(self, workload: Workload, schedule: MemoryScan, threads: Threads, n: Any, g: Any, tokens: Any,
                 inputs: tuple[Any, ...]) -> None:  # fmt: skip
        self.K, self.M, self.D = (workload.shape[axis] for axis in "KMD")
        self.tile, self.lanes, self.chunk = schedule.tile, schedule.slot_lanes, schedule.chunk
        self.constants, self.dtype, self.sums = workload.constants, workload.dtype, emit.sum_type(workload.dtype)
        self.threads, self.n, self.first, self.tokens, self.inputs = threads, n, g * self.tile, tokens, inputs
        self.g = g
        K, tile, chunk, sums = self.K, self.tile, self.chunk, self.sums
        self.state = threads.shared((self.M, tile), sums)
        self.mass = threads.shared((self.M,), sums)
        # Two chunks of each, in turn.
        self.write_slots, self.read_slots = (threads.shared((2, chunk, K), "int32") for _ in range(2))
        self.weights, self.decays, self.factors = (threads.shared((2, chunk, K), sums) for _ in range(3))
        self.values = threads.shared((2, chunk, tile), sums)
        self.totals = threads.shared((chunk, K), sums)  # the mass at each read
        self.parts = threads.shared((chunk, self.lanes, tile), sums)
        pairs, channels = (-(-chunk * width // threads.count) for width in (K, tile))
        self.coming = [threads.private(pairs, kind) for kind in ("int32", sums, "int32", sums)]
        self.coming_values = threads.private(channels, sums)
        # With a lane alone threads meet in the mass only, whose K threads stand in one warp.
        self.in_warp = self.lanes == 1 and K <= WARP

    def emit(self, S0: Any, Z0: Any, O: Any, S: Any, Z: Any) -> None:
        threads, chunk = self.threads, self.chunk
        chunks = (self.tokens + chunk - 1) // chunk
        zero = emit.constant(0, "int64")
        with threads.program():
            threads.spread(self.M, lambda i: emit.store(self.mass, [i], Z0[self.n, i].astype(self.sums)))
            self.each_entry(lambda m, j, d: emit.store(self.state, [m, j], S0[self.n, m, d].astype(self.sums)))
            for c in range(2):
                self.load(zero + c)
                self.put(zero + c)
            threads.barrier()
            with builder.serial(0, chunk) as i:
                self.write_mass(0, i)
                threads.barrier(self.in_warp)
                self.read_mass(0, i)
                threads.barrier(self.in_warp)
            threads.barrier()
            self.divide(0)
            threads.barrier()
            with builder.serial(0, chunks) as c:
                self.load(c + 2)
                with builder.serial(0, chunk // UNROLL) as group:
                    for j in range(UNROLL):
                        self.token((c % 2).astype("int32"), group * UNROLL + j)
                threads.barrier()
                self.give(c, O)
                self.divide(1 - (c % 2).astype("int32"))
                self.put(c + 2)
                threads.barrier()
            self.each_entry(lambda m, j, d: emit.store(S, [self.n, m, d], self.state[m, j].astype(S.dtype)))
            with builder.If(self.g == 0), builder.Then():
                threads.spread(self.M, lambda i: emit.store(Z, [self.n, i], self.mass[i].astype(Z.dtype)))

    def token(self, half: Any, i: Any) -> None:
        """Token ``i`` of the chunk in ``half``, and of the next chunk's mass."""
        self.write_rows(half, i)
        self.write_mass(1 - half, i)
        self.threads.barrier(self.in_warp)
        self.read_rows(half, i)
        self.read_mass(1 - half, i)
        self.threads.barrier(self.in_warp)

    def each_entry(self, body: Any) -> None:
        """``body(slot, column, channel)`` for the tile's entries of the state."""
        tile = self.tile
        self.threads.spread(self.M * tile, lambda e: self.at_channel(e % tile, lambda d: body(e // tile, e % tile, d)))

    def at_channel(self, column: Any, body: Any) -> None:
        """``body(channel)`` where the tile's column is a channel: the last tile may be wider than what is left."""
        emit.below(self.first + column, self.D, body)

    def load(self, c: Any) -> None:
        """Chunk ``c`` from global memory to registers, with operands that do nothing past the end."""
        WS, W, RS, R, V = self.inputs

        def pair(e: Any, thread: Any, turn: int) -> None:
            t, k = c * self.chunk + e // self.K, e % self.K
            inside = t < self.tokens
            for kept, source in zip(self.coming, (WS, W, RS, R), strict=True):
                kind = kept.buffer.dtype
                nothing = k if kind == "int32" else emit.constant(0, kind)
                kept.store(thread, turn, chosen(inside, source[self.n, t, k].astype(kind), nothing))

        def value(e: Any, thread: Any, turn: int) -> None:
            t, d = c * self.chunk + e // self.tile, self.first + e % self.tile
            inside = tvm.tirx.all(t < self.tokens, d < self.D)
            taken = chosen(inside, V[self.n, t, d].astype(self.sums), emit.constant(0, self.sums))
            self.coming_values.store(thread, turn, taken)

        self.threads.share(self.chunk * self.K, pair)
        self.threads.share(self.chunk * self.tile, value)

    def put(self, c: Any) -> None:
        """The same from registers to shared memory, weights with their decays."""
        gamma, half = self.constants["decay_power"], (c % 2).astype("int32")

        def pair(e: Any, thread: Any, turn: int) -> None:
            at = [half, e // self.K, e % self.K]
            slot, weight, read_slot, read = (kept.load(thread, turn) for kept in self.coming)
            emit.store(self.write_slots, at, slot)
            emit.store(self.weights, at, weight)
            emit.store(self.decays, at, emit.decay(weight, gamma, self.sums))
            emit.store(self.read_slots, at, read_slot)
            emit.store(self.factors, at, read)

        def value(e: Any, thread: Any, turn: int) -> None:
            emit.store(self.values, [half, e // self.tile, e % self.tile], self.coming_values.load(thread, turn))

        self.threads.share(self.chunk * self.K, pair)
        self.threads.share(self.chunk * self.tile, value)

    def write_mass(self, half: Any, i: Any) -> None:
        def write(k: Any, *_: Any) -> None:
            slot = self.write_slots[half, i, k]
            grown = self.decays[half, i, k] * self.mass[slot] + self.weights[half, i, k]
            emit.store(self.mass, [slot], grown)

        self.threads.share(self.K, write)

    def read_mass(self, half: Any, i: Any) -> None:
        self.threads.share(
            self.K, lambda k, *_: emit.store(self.totals, [i, k], self.mass[self.read_slots[half, i, k]])
        )

    def divide(self, half: Any) -> None:
        """What each read of a chunk is scaled by, in the place of its weight: all at once, off the tokens' chain."""
        eps = emit.constant(self.constants["eps"], self.sums)

        def one(e: Any, *_: Any) -> None:
            i, k = e // self.K, e % self.K
            emit.store(self.factors, [half, i, k], self.factors[half, i, k] / (self.totals[i, k] + eps))

        self.threads.share(self.chunk * self.K, one)

    def write_rows(self, half: Any, i: Any) -> None:
        width = self.K // self.lanes

        def write(thread: Any) -> None:
            column, first = thread % self.tile, thread // self.tile * width
            slots = emit.registers(self.threads.cuda, width, "int32")
            weights, decays, old = (emit.registers(self.threads.cuda, width, self.sums) for _ in range(3))
            for mine, theirs in ((slots, self.write_slots), (weights, self.weights), (decays, self.decays)):
                emit.copy(mine, theirs, [half, i], first, width)
            for k in range(width):
                emit.store(old, [k], self.state[slots[k], column])
            for k in range(width):
                added = weights[k] * self.values[half, i, column]
                emit.store(self.state, [slots[k], column], decays[k] * old[k] + added)

        self.threads.each(write)

    def read_rows(self, half: Any, i: Any) -> None:
        width = self.K // self.lanes

        def read(thread: Any) -> None:
            column, first = thread % self.tile, thread // self.tile * width
            slots = emit.registers(self.threads.cuda, width, "int32")
            factors = emit.registers(self.threads.cuda, width, self.sums)
            emit.copy(slots, self.read_slots, [half, i], first, width)
            emit.copy(factors, self.factors, [half, i], first, width)
            total = None
            for k in range(width):
                term = factors[k] * self.state[slots[k], column]
                total = term if total is None else total + term
            emit.store(self.parts, [i, thread // self.tile, column], total)

        self.threads.each(read)

    def give(self, c: Any, O: Any) -> None:
        """The lanes' sums of chunk ``c``, in the order of the lanes, to the output."""

        def token(e: Any) -> None:
            i, column = e // self.tile, e % self.tile
            t = c * self.chunk + i
            total = self.parts[i, 0, column]
            for lane in range(1, self.lanes):
                total = total + self.parts[i, lane, column]
            with builder.If(t < self.tokens), builder.Then():
                self.at_channel(column, lambda d: emit.store(O, [self.n, t, d], total.astype(self.dtype)))

        self.threads.spread(self.chunk * self.tile, token)
