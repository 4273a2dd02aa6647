"""The loop that the scans of form "shared" have in common: a warp scans a head's tokens with rows in shared memory.

Thread (lane, group) handles its group's channels in K / lanes of a token's slots. Within a phase, threads access
disjoint data, since a token's slots are distinct; between phases there is a warp barrier. One chunk of operands is in
shared memory while the next is loaded, and a thread loads a token's operands one token ahead.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

from tvm.script.ir_builder import tirx as builder

from lowering import emit
from lowering.gpu.memory_scan.shared.operand import Operand
from lowering.gpu.threads import Private, Threads
from schedules.gpu.shared import SharedScan
from schedules.workload import Workload

# Called as (thread, turn, t, ahead): a thread's work on token t. It calls ``ahead``, which prefetches, after its loads.
TokenWork = Callable[[Any, int, Any, Callable[[], None]], None]


class TokenWalk:
    """Emits the parts of one program, for head ``n``, tile ``g`` of the channels and ``tokens`` tokens.

    ``rows`` [M, tile] is the state or its gradient, and ``mass`` [M] the mass or its gradient.
    """

    def __init__(self, workload: Workload, schedule: SharedScan, threads: Threads, n: Any, g: Any, tokens: Any) -> None:
        self.K, self.M, self.D = (workload.shape[axis] for axis in "KMD")
        self.tile, self.channels, self.chunk = schedule.tile, schedule.channels, schedule.chunk
        self.groups, self.width = self.tile // self.channels, self.K // schedule.slot_lanes
        self.straight = schedule.straight
        self.constants, self.sums = workload.constants, emit.sum_type(workload.dtype)
        self.threads, self.n, self.g, self.tokens = threads, n, g, tokens.astype("int32")
        self.chunks = (self.tokens + self.chunk - 1) // self.chunk
        # The bits of a thread's index that select its lane and its group.
        bits = [1 << bit for bit in range(threads.count.bit_length() - 1)]
        self.lane_strides = [bit for bit in bits if bit >= self.groups]
        self.group_strides = [bit for bit in bits if bit < self.groups]
        self.rows = threads.shared((self.M, self.tile), self.sums)
        self.mass = threads.shared((self.M,), self.sums)

    def by_slot(self, *buffers: Any) -> list[Operand]:
        """Create operands of buffers [N, T, K]."""
        return [Operand(self, buffer, True, False) for buffer in buffers]

    def by_channel(self, *buffers: Any) -> list[Operand]:
        """Create operands of buffers [N, T, D]."""
        return [Operand(self, buffer, False, True) for buffer in buffers]

    def by_both(self, buffer: Any) -> Operand:
        """Create an operand of a buffer [N, T, K, channels of all tiles]."""
        return Operand(self, buffer, True, True)

    def slot(self, thread: Any, j: int) -> Any:
        """Return k of the thread's j-th slot."""
        return thread // self.groups * self.width + j

    def column(self, thread: Any) -> Any:
        """Return the thread's first channel within the tile."""
        return thread % self.groups * self.channels

    def channel(self, thread: Any) -> Any:
        """Return the thread's first channel within the head."""
        return self.g * self.tile + self.column(thread)

    def first_group(self, thread: Any) -> Any:
        """Return whether the thread is in group 0, so that one thread per slot is selected."""
        return thread % self.groups == 0

    def go(self, phases: Sequence[tuple[Sequence[Operand], TokenWork]], give: Callable[[Any], None],
           reverse_time: bool = False) -> None:  # fmt: skip
        """Emit the loop over all tokens, with ``phases`` and their operands, and ``give(t)`` after each unrolled group.

        t is the first token of the group. Turn i is the group's i-th token, in reverse time the i-th from its end.
        """
        operands = [operand for mine, _ in phases for operand in mine]
        parts = self.chunk // self.straight

        def ask(step: Any) -> None:
            c = self.chunks - 1 - step if reverse_time else step
            with builder.If(step < self.chunks), builder.Then(), builder.If((c + 1) * self.chunk <= self.tokens):
                with builder.Then():
                    for operand in operands:
                        operand.ask(c, whole=True)
                with builder.Else():
                    for operand in operands:
                        operand.ask(c, whole=False)

        def put() -> None:
            self.threads.barrier()
            for operand in operands:
                operand.put()
            self.threads.barrier()

        ask(emit.constant(0, "int32"))
        put()
        with builder.serial(0, self.chunks) as step:
            c = self.chunks - 1 - step if reverse_time else step
            ask(step + 1)
            with builder.serial(0, parts) as part:
                first = (parts - 1 - part if reverse_time else part) * self.straight
                self._straight(phases, c, first, reverse_time)
                give(c * self.chunk + first)
            put()

    def _straight(
        self, phases: Sequence[tuple[Sequence[Operand], TokenWork]], c: Any, first: Any, reverse_time: bool
    ) -> None:
        def token(turn: int) -> Any:
            return first + (self.straight - 1 - turn if reverse_time else turn)

        def fetch(thread: Any, turn: int, operands: Sequence[Operand]) -> None:
            for operand in operands if turn < self.straight else ():
                operand.fetch(thread, token(turn), turn)

        for operands, _ in phases:
            self.threads.each(lambda thread, mine=operands: fetch(thread, 0, mine))  # type: ignore[misc]
        for turn in range(self.straight):
            for operands, work in phases:

                def mine(thread: Any, turn: int = turn, work: TokenWork = work, operands: Any = operands) -> None:
                    work(thread, turn, c * self.chunk + token(turn), lambda: fetch(thread, turn + 1, operands))

                self.threads.each(mine)
                self.threads.barrier()

    def row(self, thread: Any, slot: Any) -> Any:
        """Emit loads of the thread's channels of a slot's row into registers."""
        held = emit.registers(self.threads.cuda, self.channels, self.sums)
        emit.copy(held, [0], self.rows, [slot, self.column(thread)], self.channels)
        return held

    def put_row(self, thread: Any, slot: Any, value: Callable[[int], Any]) -> None:
        """Emit stores of the thread's channels of a slot's row."""
        emit.put(self.threads.cuda, self.rows, [slot, self.column(thread)], self.channels, value)

    def masses(self, slots: Sequence[Any]) -> Any:
        """Emit loads of the masses of the thread's slots into registers."""
        held = emit.registers(self.threads.cuda, self.width, self.sums)
        for j, slot in enumerate(slots):
            emit.store(held, [j], self.mass[slot])
        return held

    def decays(self, weights: Sequence[Any]) -> Any:
        """Emit (1 − w)^γ of the thread's weights into registers."""
        held = emit.registers(self.threads.cuda, self.width, self.sums)
        for j, weight in enumerate(weights):
            emit.store(held, [j], emit.decay(weight, self.constants["decay_power"], self.sums))
        return held

    def fold(self, values: Private, count: int, strides: Sequence[int], together: int,
             store: Callable[[Any, Any, int, Callable[[int], Any]], None]) -> None:  # fmt: skip
        """Emit sums of ``count`` values over the threads that differ in ``strides``, and ``store`` them.

        ``store(thread, place, size, value)`` stores ``size`` sums from the ``place``-th on, ``value(i)`` being the i-th
        of them. They never cross a multiple of ``together``.
        """
        folded = self.threads.fold(values, count, strides)
        size = math.gcd(folded.count, together)

        def mine(thread: Any) -> None:
            for start in range(0, folded.count, size):

                def value(i: int, start: int = start) -> Any:
                    return values.load(thread, start + i)

                with builder.If(folded.leads(thread)), builder.Then():
                    store(thread, folded.first(thread) + start, size, value)

        self.threads.each(mine)

    def fill(self, rows: Any, mass: Any) -> None:
        """Emit loads of rows [N, M, D] and mass [N, M] into shared memory, with 0 for channels beyond the last."""

        def load(item: Any, held: Any, at: list[Any]) -> None:
            _, there = self._places(item)
            if self.D % self.tile == 0:
                emit.copy(held, at, rows, there, self.channels)
                return
            with builder.If(there[-1] < self.D):
                with builder.Then():
                    emit.copy(held, at, rows, there, self.channels)
                with builder.Else():
                    for c in range(self.channels):
                        emit.store(held, [*at[:-1], at[-1] + c], emit.constant(0, str(rows.dtype)))

        def put(item: Any, held: Any, at: list[Any]) -> None:
            here, _ = self._places(item)
            emit.put(self.threads.cuda, self.rows, here, self.channels, lambda c: held[(*at[:-1], at[-1] + c)])

        self.threads.carry(self.M * self.groups, self.channels, str(rows.dtype), load, put)
        self.threads.carry(
            self.M, 1, str(mass.dtype), lambda m, held, at: emit.store(held, at, mass[self.n, m]),
            lambda m, held, at: emit.store(self.mass, [m], held[tuple(at)].astype(self.sums)),
        )  # fmt: skip

    def give_rows(self, rows: Any) -> None:
        """Emit stores of the rows from shared memory to [N, M, D]."""

        def put(item: Any) -> None:
            here, there = self._places(item)
            held = emit.registers(self.threads.cuda, self.channels, self.sums)
            with builder.If(there[-1] < self.D), builder.Then():
                emit.copy(held, [0], self.rows, here, self.channels)
                emit.put(self.threads.cuda, rows, there, self.channels, lambda c: held[c])

        self.threads.spread(self.M * self.groups, put)

    def give_mass(self, mass: Any) -> None:
        """Emit stores of the mass from shared memory to [N, M]."""
        self.threads.spread(self.M, lambda m: emit.store(mass, [self.n, m], self.mass[m].astype(str(mass.dtype))))

    def _places(self, item: Any) -> tuple[list[Any], list[Any]]:
        """Return the indices of an item (a group's channels of a row) in shared memory and in [N, M, D]."""
        slot, column = item // self.groups, item % self.groups * self.channels
        return [slot, column], [self.n, slot, self.g * self.tile + column]
