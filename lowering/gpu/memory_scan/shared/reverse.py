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
from lowering.gpu.memory_scan.shared.rows import Rows
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
        self.read_rows = Rows(walk, self.read_slots)
        self.write_rows = Rows(walk, self.write_slots, after=self.read_slots)
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
        operands = [self.read_slots, self.read_weights, self.inverses, self.grads]
        operands += [self.write_slots, self.weights, self.values, self.history]
        operands += [self.pushes, self.old_masses] if with_mass else []
        steps = [partial(step, with_mass=with_mass) for step in (self.read, self.write, self.differentiate)]
        rows = [self.read_rows, self.write_rows]
        self.walk.go(operands, rows, steps, self.give, with_mass, reverse_time=True)

    def read(self, thread: Any, turn: int, t: Any, ahead: Callable[[], None], with_mass: bool) -> None:
        """Emit adding the output's gradient to the gradients of the rows that the token read."""
        walk, rows = self.walk, self.read_rows
        ahead()
        for j in range(walk.width):
            slot = rows.slot(thread, turn, j)
            pull = self.read_weights.get(thread, turn, j) * self.inverses.get(thread, turn, j)

            def pulled(c: int, j: int = j, pull: Any = pull) -> Any:
                return rows.row(thread, turn, j, c) + pull * self.grads.get(thread, turn, c)

            walk.put_row(thread, slot, pulled)
            if with_mass:
                with builder.If(walk.first_group(thread)), builder.Then():
                    emit.store(walk.mass, [slot], rows.mass(thread, turn, j) - self.pushes.get(thread, turn, j))

    def write(self, thread: Any, turn: int, t: Any, ahead: Callable[[], None], with_mass: bool) -> None:
        """Emit multiplying the gradients of the rows that the token wrote by its decays."""
        walk, rows, each = self.walk, self.write_rows, range(self.walk.width)
        decays = walk.decays([self.weights.get(thread, turn, j) for j in each])
        rows.again(thread, turn, with_mass)
        ahead()
        for j in each:
            slot = rows.slot(thread, turn, j)
            walk.put_row(thread, slot, lambda c, j=j: decays[j] * rows.row(thread, turn, j, c))  # type: ignore[misc]
            if with_mass:
                with builder.If(walk.first_group(thread)), builder.Then():
                    emit.store(walk.mass, [slot], decays[j] * rows.mass(thread, turn, j))

    def differentiate(self, thread: Any, turn: int, t: Any, ahead: Callable[[], None], with_mass: bool) -> None:
        """Emit the gradients of the token's value and weights."""
        walk, rows, each = self.walk, self.write_rows, range(self.walk.width)
        gamma, proxy_eps = walk.constants["decay_power"], walk.constants["proxy_eps"]
        zero, one = (emit.constant(number, walk.sums) for number in (0, 1))
        slopes, dot = (emit.registers(walk.threads.cuda, size, walk.sums) for size in (walk.width, 1))
        ahead()
        for j in each:
            emit.store(slopes, [j], emit.decay_slope(self.weights.get(thread, turn, j), gamma, proxy_eps, walk.sums))
            for c in range(walk.channels):
                # The weight's gradient is dS·v from the write and dS·row from the decay; both are one dot product.
                row = self.history.get(thread, turn, j * walk.channels + c)
                term = rows.row(thread, turn, j, c) * (self.values.get(thread, turn, c) + slopes[j] * row)
                emit.store(dot, [0], term if c == 0 else dot[0] + term)
            if with_mass:
                through = rows.mass(thread, turn, j) * (one + slopes[j] * self.old_masses.get(thread, turn, j))
                emit.store(dot, [0], dot[0] + tir.Select(walk.first_group(thread), through, zero))
            self.dots.store(thread, turn * walk.width + j, dot[0])
        for c in range(walk.channels):
            total = self.weights.get(thread, turn, 0) * rows.row(thread, turn, 0, c)
            for j in each[1:]:
                total = total + self.weights.get(thread, turn, j) * rows.row(thread, turn, j, c)
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
