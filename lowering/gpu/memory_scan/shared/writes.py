"""The write of a token in the scans of form "shared" (paper, step 5)."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from tvm.script.ir_builder import tirx as builder

from lowering import emit
from lowering.gpu.memory_scan.shared.rows import Rows
from lowering.gpu.memory_scan.shared.walk import TokenStep, TokenWalk

# Called as (thread, t, j, row, mass) for the write to the thread's j-th slot of token t. row(c), channel c of the row,
# and mass, which may be None, are the values before the write.
Keep = Callable[[Any, Any, int, Callable[[int], Any], Any], None]


class Writes:
    """Emits a token's write to the rows of a ``TokenWalk`` and, if ``with_mass``, to its mass."""

    def __init__(self, walk: TokenWalk, WS: Any, W: Any, V: Any) -> None:
        self.walk = walk
        self.slots, self.weights = walk.by_slot(WS, W)
        (self.values,) = walk.by_channel(V)
        self.operands = (self.slots, self.weights, self.values)
        self.rows = Rows(walk, self.slots)

    def step(self, with_mass: bool = True, keep: Keep | None = None) -> TokenStep:
        """Return the step for ``TokenWalk.go``."""
        walk, each, rows = self.walk, range(self.walk.width), self.rows

        def write(thread: Any, turn: int, t: Any, ahead: Callable[[], None]) -> None:
            slots = [rows.slot(thread, turn, j) for j in each]
            weights = [self.weights.get(thread, turn, j) for j in each]
            decays = walk.decays(weights)
            masses = [rows.mass(thread, turn, j) if with_mass else None for j in each]
            ahead()
            for j in each:

                def old(c: int, j: int = j) -> Any:
                    return rows.row(thread, turn, j, c)

                if keep is not None:
                    keep(thread, t, j, old, masses[j])

                def grown(c: int, j: int = j, old: Callable[[int], Any] = old) -> Any:
                    added = weights[j] * self.values.get(thread, turn, c)
                    return walk.threads.multiply_add(decays[j], old(c), added, walk.sums)

                walk.put_row(thread, slots[j], grown)
                if with_mass:
                    with builder.If(walk.first_group(thread)), builder.Then():
                        emit.store(walk.mass, [slots[j]], decays[j] * masses[j] + weights[j])

        return write
