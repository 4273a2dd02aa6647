"""The recomputation in memory_scan_backward: runs the forward again and saves what the reverse pass needs.

These are the row that each write replaces, the dot product of each row read with the output's gradient, and, from the
first tile's program, the mass before each write and 1 / (z + ε) at each read.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

from tvm.script.ir_builder import tirx as builder

from lowering import emit
from lowering.gpu.memory_scan.shared.walk import TokenWalk
from lowering.gpu.memory_scan.shared.writes import Writes


class Recompute:
    """Emits one program; ``outputs`` are history, the tile's dot products, masses before writes, inverses at reads."""

    def __init__(self, walk: TokenWalk, writes: Writes, RS: Any, dO: Any, outputs: tuple[Any, ...]) -> None:
        self.walk, self.writes = walk, writes
        (self.slots,), (self.grads,) = walk.by_slot(RS), walk.by_channel(dO)
        self.history, self.parts, self.old_masses, self.inverses = outputs
        self.dots = walk.threads.private(walk.straight * walk.width, walk.sums)

    def emit(self, S0: Any, Z0: Any) -> None:
        walk = self.walk
        with walk.threads.program():
            walk.fill(S0, Z0)
            with builder.If(walk.g == 0):
                with builder.Then():
                    self.go(with_mass=True)
                with builder.Else():
                    self.go(with_mass=False)

    def go(self, with_mass: bool) -> None:
        reads = (self.slots, self.grads)
        write = self.writes.work(with_mass, self.keep)
        self.walk.go([(self.writes.operands, write), (reads, partial(self.read, with_mass=with_mass))], self.give)

    def keep(self, thread: Any, t: Any, j: int, row: Callable[[int], Any], mass: Any) -> None:
        """Emit stores of the row and the mass that a write replaces."""
        walk, at = self.walk, [self.walk.n, t, self.walk.slot(thread, j)]
        emit.put(walk.threads.cuda, self.history, [*at, walk.channel(thread)], walk.channels, row)
        if mass is not None:
            with builder.If(walk.first_group(thread)), builder.Then():
                emit.store(self.old_masses, at, mass)

    def read(self, thread: Any, turn: int, t: Any, ahead: Callable[[], None], with_mass: bool) -> None:
        """Emit the thread's part of the dot product of each row read."""
        walk, each = self.walk, range(self.walk.width)
        one, eps = emit.constant(1, walk.sums), emit.constant(walk.constants["eps"], walk.sums)
        slots = [self.slots.get(thread, turn, j) for j in each]
        rows = [walk.row(thread, slot) for slot in slots]
        masses = walk.masses(slots) if with_mass else None
        inverses = emit.registers(walk.threads.cuda, walk.width, walk.sums)
        ahead()
        for j in each:
            dot = rows[j][0] * self.grads.get(thread, turn, 0)
            for c in range(1, walk.channels):
                dot = dot + rows[j][c] * self.grads.get(thread, turn, c)
            self.dots.store(thread, turn * walk.width + j, dot)
            if masses is not None:
                emit.store(inverses, [j], walk.threads.quotient(one, masses[j] + eps, walk.sums))
                with builder.If(walk.first_group(thread)), builder.Then():
                    emit.store(self.inverses, [walk.n, t, walk.slot(thread, j)], inverses[j])

    def give(self, first: Any) -> None:
        """Emit the sums over groups of the tokens from ``first``, which are this tile's partial dot products."""
        walk = self.walk

        def store(thread: Any, place: Any, size: int, value: Callable[[int], Any]) -> None:
            t = first + place // walk.width
            at = [walk.n, walk.g, t, walk.slot(thread, 0) + place % walk.width]
            emit.put(walk.threads.cuda, self.parts, at, size, value)

        walk.fold(self.dots, walk.straight * walk.width, walk.group_strides, walk.width, store)
