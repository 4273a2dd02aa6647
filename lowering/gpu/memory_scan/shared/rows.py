"""The rows and masses at a token's slots, which the threads of a ``TokenWalk`` load one token ahead."""

from __future__ import annotations

from typing import Any

import tvm.tirx as tir
from tvm.script.ir_builder import tirx as builder

from lowering import emit
from lowering.gpu.memory_scan.shared.operand import Operand


class Rows:
    """A thread's channels of the rows at ``slots``, and their masses, in one of two sets of registers.

    Args:
        walk: the ``TokenWalk``.
        slots: the operand of the slots.
        after: the operand of the slots to which the token itself writes before these rows are used, if it does. Slots
            that are among them are marked by ~slot in shared memory, and their rows are loaded again.
    """

    def __init__(self, walk: Any, slots: Operand, after: Operand | None = None) -> None:
        self.walk, self.slots, self.after = walk, slots, after
        self.held = walk.threads.private(2 * walk.width * walk.channels, walk.sums)
        self.held_masses = walk.threads.private(2 * walk.width, walk.sums)

    def mark(self) -> None:
        """Emit marking the slots of the chunk in shared memory."""
        if self.after is None:
            return
        K, cuda, mine, others = self.walk.K, self.walk.threads.cuda, self.slots.here, self.after.here

        def item(e: Any, thread: Any, turn: int) -> None:
            i, k = e // K, e % K
            slot, written = emit.registers(cuda, 1, "int32"), emit.registers(cuda, K, "int32")
            emit.store(slot, [0], mine[i, k])
            emit.copy(written, [0], others, [i, 0], K)
            again = tir.any(tir.const(False, "bool"), *(written[j] == slot[0] for j in range(K)))
            emit.store(mine, [i, k], tir.Select(again, -1 - slot[0], slot[0]))

        self.walk.threads.share(self.slots.items, item)

    def slot(self, thread: Any, turn: int, j: int) -> Any:
        """Return the thread's j-th slot."""
        slot = self.slots.get(thread, turn, j)
        return slot if self.after is None else tir.max(slot, -1 - slot)

    def load(self, thread: Any, turn: int, with_mass: bool) -> None:
        """Emit the loads."""
        for j in range(self.walk.width):
            self._load(thread, turn, j, with_mass)

    def again(self, thread: Any, turn: int, with_mass: bool) -> None:
        """Emit the loads at marked slots."""
        for j in range(self.walk.width):
            with builder.If(self.slots.get(thread, turn, j) < 0), builder.Then():
                self._load(thread, turn, j, with_mass)

    def row(self, thread: Any, turn: int, j: int, c: int) -> Any:
        """Return channel c of the row at the thread's j-th slot."""
        return self.held.load(thread, self._place(turn, j) * self.walk.channels + c)

    def mass(self, thread: Any, turn: int, j: int) -> Any:
        """Return the mass at the thread's j-th slot."""
        return self.held_masses.load(thread, self._place(turn, j))

    def _load(self, thread: Any, turn: int, j: int, with_mass: bool) -> None:
        walk, slot, place = self.walk, self.slot(thread, turn, j), self._place(turn, j)
        at = self.held.at(thread, place * walk.channels)
        emit.copy(self.held.buffer, at, walk.rows, [slot, walk.column(thread)], walk.channels)
        if with_mass:
            self.held_masses.store(thread, place, walk.mass[slot])

    def _place(self, turn: int, j: int) -> int:
        return turn % 2 * self.walk.width + j
