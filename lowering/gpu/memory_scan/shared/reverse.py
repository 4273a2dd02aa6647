"""The reverse pass of memory_scan_backward: updates the state's gradient from the last token to the first.

The first tile's program also has the mass's gradient, and adds its contribution to its partial dot products.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import tvm.tirx as tir
from tvm.script.ir_builder import tirx as builder

from lowering import emit
from lowering.gpu.memory_scan.shared.walk import TokenWalk


class Reverse:
    """Emits one program.

    Args:
        by_slot: write slots and weights, masses before writes, read slots and weights, inverses, and gradients of the
            mass at reads.
        by_channel: gradients of the output, and values.
        history: the rows before writes.
        parts, dV: the outputs for dot products and for gradients of the values.
    """

    def __init__(self, walk: TokenWalk, by_slot: tuple[Any, ...], by_channel: tuple[Any, ...], history: Any, parts: Any,
                 dV: Any) -> None:  # fmt: skip
        self.walk, self.parts, self.grad_values = walk, parts, dV
        (self.write_slots, self.weights, self.old_masses, self.read_slots, self.read_weights, self.inverses,
         self.pushes) = walk.by_slot(*by_slot)  # fmt: skip
        self.grads, self.values = walk.by_channel(*by_channel)
        self.history = walk.by_both(history)
        self.dots = walk.threads.private(walk.straight * walk.width, walk.sums)
        self.totals = walk.threads.private(walk.straight * walk.channels, walk.sums)

    def emit(self, dS1: Any, dZ1: Any, dS: Any, dZ: Any) -> None:
        walk = self.walk
        with walk.threads.program():
            walk.fill(dS1, dZ1)
            with builder.If(walk.g == 0):
                with builder.Then():
                    self.go(with_mass=True)
                    walk.give_mass(dZ)
                with builder.Else():
                    self.go(with_mass=False)
            walk.give_rows(dS)

    def go(self, with_mass: bool) -> None:
        reads = [self.read_slots, self.read_weights, self.inverses, self.grads]
        writes = [self.write_slots, self.weights, self.values, self.history]
        if with_mass:
            reads.append(self.pushes)
            writes.append(self.old_masses)
        phases = [(reads, partial(self.read, with_mass=with_mass)), (writes, partial(self.write, with_mass=with_mass))]
        self.walk.go(phases, self.give, reverse_time=True)

    def read(self, thread: Any, turn: int, t: Any, ahead: Callable[[], None], with_mass: bool) -> None:
        """Emit adding the output's gradient to the gradients of the rows that the token read."""
        walk, each = self.walk, range(self.walk.width)
        slots = [self.read_slots.get(thread, turn, j) for j in each]
        old, masses = [walk.row(thread, slot) for slot in slots], walk.masses(slots) if with_mass else None
        ahead()
        for j in each:
            pull = self.read_weights.get(thread, turn, j) * self.inverses.get(thread, turn, j)

            def pulled(c: int, j: int = j, pull: Any = pull) -> Any:
                return old[j][c] + pull * self.grads.get(thread, turn, c)

            walk.put_row(thread, slots[j], pulled)
            if masses is not None:
                with builder.If(walk.first_group(thread)), builder.Then():
                    emit.store(walk.mass, [slots[j]], masses[j] - self.pushes.get(thread, turn, j))

    def write(self, thread: Any, turn: int, t: Any, ahead: Callable[[], None], with_mass: bool) -> None:
        """Emit the gradients of the token's value and weights, and multiply the rows' gradients by its decays."""
        walk, each = self.walk, range(self.walk.width)
        gamma, proxy_eps = walk.constants["decay_power"], walk.constants["proxy_eps"]
        zero, one = (emit.constant(number, walk.sums) for number in (0, 1))
        slots, weights = ([x.get(thread, turn, j) for j in each] for x in (self.write_slots, self.weights))
        grads, decays = [walk.row(thread, slot) for slot in slots], walk.decays(weights)
        masses = walk.masses(slots) if with_mass else None
        slopes, dot = (emit.registers(walk.threads.cuda, size, walk.sums) for size in (walk.width, 1))
        ahead()
        for j in each:
            emit.store(slopes, [j], emit.decay_slope(weights[j], gamma, proxy_eps, walk.sums))
            for c in range(walk.channels):
                # The weight's gradient is dS·v from the write and dS·row from the decay; both are one dot product.
                row = self.history.get(thread, turn, j * walk.channels + c)
                term = grads[j][c] * (self.values.get(thread, turn, c) + slopes[j] * row)
                emit.store(dot, [0], term if c == 0 else dot[0] + term)
            if masses is not None:
                first = walk.first_group(thread)
                through = masses[j] * (one + slopes[j] * self.old_masses.get(thread, turn, j))
                emit.store(dot, [0], dot[0] + tir.Select(first, through, zero))
                with builder.If(first), builder.Then():
                    emit.store(walk.mass, [slots[j]], decays[j] * masses[j])
            self.dots.store(thread, turn * walk.width + j, dot[0])
            walk.put_row(thread, slots[j], lambda c, j=j: decays[j] * grads[j][c])  # type: ignore[misc]
        for c in range(walk.channels):
            total = weights[0] * grads[0][c]
            for j in each[1:]:
                total = total + weights[j] * grads[j][c]
            self.totals.store(thread, turn * walk.channels + c, total)

    def give(self, first: Any) -> None:
        """Emit stores of the values' gradients and this tile's partial sums of the weights', from token ``first``."""
        walk, last = self.walk, first + self.walk.straight - 1

        def weight(thread: Any, place: Any, size: int, value: Callable[[int], Any]) -> None:
            at = [walk.n, walk.g, last - place // walk.width, walk.slot(thread, 0) + place % walk.width]
            emit.put(walk.threads.cuda, self.parts, at, size, value)

        def channel(thread: Any, place: Any, size: int, value: Callable[[int], Any]) -> None:
            t, d = last - place // walk.channels, walk.channel(thread) + place % walk.channels
            with builder.If(tir.all(t < walk.tokens, d < walk.D)), builder.Then():
                emit.put(walk.threads.cuda, self.grad_values, [walk.n, t, d], size, value)

        walk.fold(self.dots, walk.straight * walk.width, walk.group_strides, walk.width, weight)
        walk.fold(self.totals, walk.straight * walk.channels, walk.lane_strides, walk.channels, channel)
