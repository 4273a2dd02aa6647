"""One program of memory_scan_backward's state: state and gradient of a head's tile of channels in shared memory.

The tokens are walked once forward, with a copy of the state every ``checkpoint`` of them, then segment by segment from
the last one: forward from the segment's copy, keeping the row that each write replaces, and back through the kept rows.
No decay is ever inverted.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import tvm.tirx as tir
from tvm.script.ir_builder import tirx as builder

from lowering.tir import emit
from lowering.tir.threads import Threads, chosen
from schedules.gpu.scan import MemoryScanBackward
from schedules.workload import Workload


class Rows:
    """Emits one program: head n, tile g."""

    def __init__(self, workload: Workload, schedule: MemoryScanBackward, threads: Threads, at: tuple[Any, Any],
                 lengths: tuple[Any, Any], inputs: tuple[Any, ...], scratch: tuple[Any, Any]) -> None:  # fmt: skip
        self.K, self.M, self.D = (workload.shape[axis] for axis in "KMD")
        self.tile, self.lanes, self.chunk = schedule.tile, schedule.slot_lanes, schedule.chunk
        self.checkpoint = schedule.checkpoint
        self.constants, self.dtype, self.sums = workload.constants, workload.dtype, emit.sum_type(workload.dtype)
        (self.n, self.g), (self.tokens, self.segments) = at, lengths
        self.threads, self.inputs, (self.copies, self.history) = threads, inputs, scratch
        K, tile, chunk, sums = self.K, self.tile, self.chunk, self.sums
        self.state, self.gradient = (threads.shared((self.M, tile), sums) for _ in range(2))
        self.write_slots, self.read_slots = (threads.shared((chunk, K), "int32") for _ in range(2))
        self.weights, self.decays, self.slopes, self.pulls = (threads.shared((chunk, K), sums) for _ in range(4))
        self.values, self.grads = (threads.shared((chunk, tile), sums) for _ in range(2))
        self.rows = threads.shared((chunk, K, tile), sums)
        # A column more, so that threads that each sum a row meet different banks.
        self.write_products, self.read_products = (threads.shared((chunk, K, tile + 1), sums) for _ in range(2))
        self.parts = threads.shared((chunk, self.lanes, tile), sums)

    def emit(self, S0: Any, dS1: Any, dV: Any, dS: Any, PW: Any, PR: Any) -> None:
        with self.threads.program():
            self.fill(self.state, lambda m, d: S0[self.n, m, d])
            self.fill(self.gradient, lambda m, d: dS1[self.n, m, d])
            self.copy(0, save=True)
            with builder.serial(0, self.segments - 1) as s:
                self.forward(s, keep=False)
                self.copy(s + 1, save=True)
            with builder.serial(0, self.segments) as later:
                s = self.segments - 1 - later
                self.copy(s, save=False)
                self.forward(s, keep=True)
                self.back(s, dV, PW, PR)
            self.threads.spread(self.M * self.tile, lambda e: self.take(e // self.tile, e % self.tile, dS))

    def take(self, slot: Any, column: Any, dS: Any) -> None:
        """An entry of the first state's gradient."""
        self.at_channel(
            column, lambda d: emit.store(dS, [self.n, slot, d], self.gradient[slot, column].astype(dS.dtype))
        )

    def fill(self, buffer: Any, source: Callable[[Any, Any], Any]) -> None:
        """The tile of ``source(slot, channel)``; columns past the last channel are 0."""
        zero = emit.constant(0, self.sums)

        def put(e: Any) -> None:
            column = e % self.tile
            d = self.first + column
            value = source(e // self.tile, d).astype(self.sums)
            emit.store(buffer, [e // self.tile, column], chosen(d < self.D, value, zero))

        self.threads.spread(self.M * self.tile, put)

    @property
    def first(self) -> Any:
        return self.g * self.tile

    def at_channel(self, column: Any, body: Callable[[Any], None]) -> None:
        emit.below(self.first + column, self.D, body)

    def copy(self, s: Any, save: bool) -> None:
        """The state to its copy at the start of segment ``s``, or back."""

        def one(e: Any) -> None:
            here, there = [e // self.tile, e % self.tile], [self.n, self.g, s, e // self.tile, e % self.tile]
            if save:
                emit.store(self.copies, there, self.state[tuple(here)])
            else:
                emit.store(self.state, here, self.copies[tuple(there)])

        self.threads.barrier()
        self.threads.spread(self.M * self.tile, one)
        self.threads.barrier()

    def chunks(self, s: Any) -> Any:
        """How many chunks segment ``s`` has."""
        left = (self.tokens - s * self.checkpoint + self.chunk - 1) // self.chunk
        return tir.min(left, emit.constant(self.checkpoint // self.chunk, "int64"))

    def forward(self, s: Any, keep: bool) -> None:
        """Through segment ``s``, writing; with the rows replaced in ``history`` where they are kept."""
        with builder.serial(0, self.chunks(s)) as c:
            self.load(s * self.checkpoint + c * self.chunk)
            self.threads.barrier()
            with builder.serial(0, self.chunk) as i:
                self.write(i, c * self.chunk + i if keep else None)
                self.meet()
            self.threads.barrier()

    def back(self, s: Any, dV: Any, PW: Any, PR: Any) -> None:
        """Back through segment ``s``."""
        with builder.serial(0, self.chunks(s)) as later:
            c = self.chunks(s) - 1 - later
            start = s * self.checkpoint + c * self.chunk
            self.load(start)
            self.load_back(start, c * self.chunk)
            self.threads.barrier()
            with builder.serial(0, self.chunk) as rest:
                i = self.chunk - 1 - rest
                self.read_back(i)
                self.meet()
                self.write_back(i)
                self.meet()
            self.threads.barrier()
            self.give(start, dV, PW, PR)
            self.threads.barrier()

    def meet(self) -> None:
        """Between tokens: with a lane alone a thread owns its column, and need not wait."""
        if self.lanes > 1:
            self.threads.barrier()

    def load(self, start: Any) -> None:
        """What writes need of the chunk that starts at token ``start``; tokens past the end write nothing."""
        _, WS, W, _, _, V, _ = self.inputs
        gamma, zero = self.constants["decay_power"], emit.constant(0, self.sums)

        def pair(e: Any) -> None:
            i, k = e // self.K, e % self.K
            t = start + i
            emit.store(self.write_slots, [i, k], chosen(t < self.tokens, WS[self.n, t, k], k))
            emit.store(self.weights, [i, k], chosen(t < self.tokens, W[self.n, t, k].astype(self.sums), zero))
            emit.store(self.decays, [i, k], emit.decay(self.weights[i, k], gamma, self.sums))

        self.threads.spread(self.chunk * self.K, pair)
        self.load_channels(self.values, V, start)

    def load_channels(self, to: Any, source: Any, start: Any) -> None:
        def value(e: Any) -> None:
            i, column = e // self.tile, e % self.tile
            t, d = start + i, self.first + column
            inside = source[self.n, t, d].astype(self.sums)
            emit.store(to, [i, column], chosen(tir.all(t < self.tokens, d < self.D), inside,
                                               emit.constant(0, self.sums)))  # fmt: skip

        self.threads.spread(self.chunk * self.tile, value)

    def load_back(self, start: Any, kept: Any) -> None:
        """What the way back needs besides."""
        dO, _, W, RS, R, _, I = self.inputs
        gamma, proxy_eps = self.constants["decay_power"], self.constants["proxy_eps"]

        def pair(e: Any) -> None:
            i, k = e // self.K, e % self.K
            t = start + i
            inside = t < self.tokens
            weight = chosen(inside, W[self.n, t, k].astype(self.sums), emit.constant(0, self.sums))
            emit.store(self.slopes, [i, k], emit.decay_slope(weight, gamma, proxy_eps, self.sums))
            emit.store(self.read_slots, [i, k], chosen(inside, RS[self.n, t, k], k))
            pull = R[self.n, t, k].astype(self.sums) * I[self.n, t, k]
            emit.store(self.pulls, [i, k], chosen(inside, pull, emit.constant(0, self.sums)))

        def row(e: Any) -> None:
            i, k, column = e // (self.K * self.tile), e // self.tile % self.K, e % self.tile
            emit.store(self.rows, [i, k, column], self.history[self.n, self.g, kept + i, k, column])

        self.threads.spread(self.chunk * self.K, pair)
        self.load_channels(self.grads, dO, start)
        self.threads.spread(self.chunk * self.K * self.tile, row)

    def slots(self, body: Callable[[Any, Any, Any], None]) -> None:
        """``body(k, column, lane)`` for the slots and the column of each thread."""
        width = self.K // self.lanes

        def mine(thread: Any) -> None:
            for j in range(width):
                body(thread // self.tile * width + j, thread % self.tile, thread // self.tile)

        self.threads.each(mine)

    def write(self, i: Any, kept: Any) -> None:
        def one(k: Any, column: Any, _: Any) -> None:
            slot, old = self.write_slots[i, k], emit.registers(self.threads.cuda, 1, self.sums)
            emit.store(old, [0], self.state[slot, column])
            if kept is not None:
                emit.store(self.history, [self.n, self.g, kept, k, column], old[0])
            added = self.weights[i, k] * self.values[i, column]
            emit.store(self.state, [slot, column], self.decays[i, k] * old[0] + added)

        self.slots(one)

    def read_back(self, i: Any) -> None:
        def one(k: Any, column: Any, _: Any) -> None:
            slot = self.read_slots[i, k]
            emit.store(self.read_products, [i, k, column], self.state[slot, column] * self.grads[i, column])
            pulled = self.gradient[slot, column] + self.pulls[i, k] * self.grads[i, column]
            emit.store(self.gradient, [slot, column], pulled)

        self.slots(one)

    def write_back(self, i: Any) -> None:
        width = self.K // self.lanes

        def mine(thread: Any) -> None:
            column, lane = thread % self.tile, thread // self.tile
            total, grad = (emit.registers(self.threads.cuda, 1, self.sums) for _ in range(2))
            emit.store(total, [0], emit.constant(0, self.sums))
            for j in range(width):
                k = lane * width + j
                slot, row = self.write_slots[i, k], self.rows[i, k, column]
                emit.store(grad, [0], self.gradient[slot, column])
                emit.store(total, [0], total[0] + self.weights[i, k] * grad[0])
                # dS·v is the weight's own share and dS·row the decay's: one sum serves both.
                product = grad[0] * (self.values[i, column] + self.slopes[i, k] * row)
                emit.store(self.write_products, [i, k, column], product)
                emit.store(self.gradient, [slot, column], self.decays[i, k] * grad[0])
                emit.store(self.state, [slot, column], row)
            emit.store(self.parts, [i, lane, column], total[0])

        self.threads.each(mine)

    def give(self, start: Any, dV: Any, PW: Any, PR: Any) -> None:
        """The chunk's gradients of values, and this tile's dot products, each summed in one order."""

        def pair(e: Any) -> None:
            i, k = e // self.K, e % self.K
            total = emit.registers(self.threads.cuda, 1, self.sums)
            with builder.If(start + i < self.tokens), builder.Then():
                for products, to in ((self.write_products, PW), (self.read_products, PR)):
                    emit.store(total, [0], products[i, k, 0])
                    with builder.serial(1, self.tile) as column:
                        emit.store(total, [0], total[0] + products[i, k, column])
                    emit.store(to, [self.n, self.g, start + i, k], total[0])

        def channel(e: Any) -> None:
            i, column = e // self.tile, e % self.tile
            total = self.parts[i, 0, column]
            for lane in range(1, self.lanes):
                total = total + self.parts[i, lane, column]
            with builder.If(start + i < self.tokens), builder.Then():
                self.at_channel(column, lambda d: emit.store(dV, [self.n, start + i, d], total.astype(self.dtype)))

        self.threads.spread(self.chunk * self.K, pair)
        self.threads.spread(self.chunk * self.tile, channel)
