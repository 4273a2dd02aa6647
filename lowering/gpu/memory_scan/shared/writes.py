"""The write of a token in the scans of form "shared" (paper, step 5)."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from tvm.script.ir_builder import tirx as builder

from lowering import emit
from lowering.gpu.memory_scan.shared.walk import TokenWalk, TokenWork

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

    def work(self, with_mass: bool = True, keep: Keep | None = None) -> TokenWork:
        """Return the phase for ``TokenWalk.go``."""
        walk, each = self.walk, range(self.walk.width)

        def write(thread: Any, turn: int, t: Any, ahead: Callable[[], None]) -> None:
            slots, weights = ([x.get(thread, turn, j) for j in each] for x in (self.slots, self.weights))
            old, decays = [walk.row(thread, slot) for slot in slots], walk.decays(weights)
            masses = walk.masses(slots) if with_mass else [None] * walk.width
            ahead()
            for j in each:
                if keep is not None:
                    keep(thread, t, j, lambda c, row=old[j]: row[c], masses[j])  # type: ignore[misc]

                def grown(c: int, j: int = j) -> Any:
                    added = weights[j] * self.values.get(thread, turn, c)
                    return walk.threads.multiply_add(decays[j], old[j][c], added, walk.sums)

                walk.put_row(thread, slots[j], grown)
                if with_mass:
                    with builder.If(walk.first_group(thread)), builder.Then():
                        emit.store(walk.mass, [slots[j]], decays[j] * masses[j] + weights[j])

        return write
