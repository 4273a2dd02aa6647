"""Matrices of integers.

They are multiplied with activations that are rounded to int8, with one scale per token, by the processor's integer dot
products; sums of integers are exact.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import tvm.tirx as tir
from tvm.script import tirx as T
from tvm.script.ir_builder import tirx as builder

from lowering import emit
from lowering.aot.machines import Machine
from lowering.aot.matrix import Matrix, Tiling, by_rows, flat, widened
from lowering.aot.rounding import GROUP
from lowering.aot.sums import horizontal_sums
from schedules.base import largest_divisor

HALF = GROUP // 2
Expression = Any


class Int8(Matrix):
    """Symmetric int8 with one float32 scale per row."""

    def value(self, row: Any, column: Any) -> Expression:
        return self.weight[row, column].astype("float32") * self.scale[row]

    def prepare(self, X: Any, tokens: Any, scratch: tuple[Any, Any]) -> Any:
        """Round each token's activations to a multiple of its step, their largest magnitude / 127."""
        rounded, steps = scratch
        offset = self.machine.dot.offset
        with builder.serial(0, tokens) as t, T.sblock("round"):
            round_token(
                X,
                t,
                self.inputs,
                steps,
                lambda at, whole: emit.store(
                    rounded, [t * self.inputs + at], (whole + emit.constant(offset, "int32")).astype("int8")
                ),
            )
        return scratch

    def dots(self, rows: list[Any], prepared: Any, tokens: list[Any]) -> list[list[Expression]]:
        rounded, steps = prepared
        dot = self.machine.dot
        if dot.matrix and self.inputs % 16 == len(rows) % 2 == len(tokens) % 2 == 0:
            return self.tiles(rows, prepared, tokens)
        width = dot.width(self.inputs)
        lanes = dot.lanes(width)
        sums = [[T.sblock_alloc_buffer((lanes,), "int32") for _ in tokens] for _ in rows]
        # The activations are stored plus ``offset``, so each sum is too large by offset · Σ w.
        excess = [T.sblock_alloc_buffer((lanes,), "int32") for _ in rows] if dot.offset else []
        every = tir.Ramp(0, 1, lanes)
        for total in [*flat(sums), *excess]:
            builder.buffer_store(total, tir.Broadcast(emit.constant(0, "int32"), lanes), [every])
        with builder.serial(0, self.inputs // width) as i:
            at = tir.Ramp(i * width, 1, width)
            for r, row in enumerate(rows):
                self.fetch(rows, tokens, r, i * width, width)
                weights = self.weight[row, at]
                for token, total in zip(tokens, sums[r], strict=True):
                    activations = rounded[tir.Ramp(token * self.inputs + i * width, 1, width)]
                    value = dot.accumulate(total[every], activations, weights, width)
                    builder.buffer_store(total, value, [every])
                if excess:
                    offsets = tir.Broadcast(emit.constant(dot.offset - 256, "int8"), width)
                    value = dot.accumulate(excess[r][every], offsets, weights, width)
                    builder.buffer_store(excess[r], value, [every])
        less = horizontal_sums(excess, lanes)
        whole = by_rows(horizontal_sums(flat(sums), lanes), len(tokens))
        return [
            [
                (total - less[r] if excess else total).astype("float32") * (self.scale[row] * steps[token])
                for token, total in zip(tokens, whole[r], strict=True)
            ]
            for r, row in enumerate(rows)
        ]

    def tiles(self, rows: list[Any], prepared: Any, tokens: list[Any]) -> list[list[Expression]]:
        """Return ``dots``, computed for pairs of rows and pairs of tokens at a time.

        With smmla, a token of a block of "tiny" takes 123 000 instructions, with sdot 134 000.
        """
        rounded, steps = prepared
        sums = [[T.sblock_alloc_buffer((4,), "int32") for _ in tokens[::2]] for _ in rows[::2]]
        every = tir.Ramp(0, 1, 4)
        for total in flat(sums):
            builder.buffer_store(total, tir.Broadcast(emit.constant(0, "int32"), 4), [every])

        def pairs(vectors: list[Any]) -> list[list[Any]]:
            """Return the first, and the last, 8 numbers of each two vectors."""
            halves = ([*range(at, at + 8), *range(16 + at, 24 + at)] for at in (0, 8))
            first, last = ([tir.Shuffle([*two], half) for two in zip(vectors[::2], vectors[1::2], strict=True)]
                           for half in halves)  # fmt: skip
            return [list(both) for both in zip(first, last, strict=True)]

        with builder.serial(0, self.inputs // 16) as i:
            for r in range(len(rows)):
                self.fetch(rows, tokens, r, i * 16, 16)
            weights = pairs([self.weight[row, tir.Ramp(i * 16, 1, 16)] for row in rows])
            activations = pairs([rounded[tir.Ramp(token * self.inputs + i * 16, 1, 16)] for token in tokens])
            for of_rows, w in zip(sums, weights, strict=True):
                for total, a in zip(of_rows, activations, strict=True):
                    value = total[every]
                    for half in range(2):
                        value = tir.call_llvm_pure_intrin("int32x4", self.machine.dot.matrix, value, w[half], a[half])
                    builder.buffer_store(total, value, [every])
        return [
            [
                sums[r // 2][t // 2][r % 2 * 2 + t % 2].astype("float32") * (self.scale[row] * steps[token])
                for t, token in enumerate(tokens)
            ]
            for r, row in enumerate(rows)
        ]


class Int4(Matrix):
    """Symmetric int4 with a bfloat16 scale for each group of 32 inputs of a row; see ``lowering.aot.rounding``.

    A load of ``width`` bytes has the weights of 2 · ``width`` inputs: those of the low halves of its groups, then those
    of the high halves. The activations are laid out in the same order, followed by what the sums start with.
    """

    def __init__(self, outputs: int, inputs: int, weight: Any, scale: Any, machine: Machine, tiling: Tiling) -> None:
        super().__init__(outputs, inputs, weight, scale, machine, tiling)
        self.width = machine.dot.width(inputs // 2)
        self.lanes = machine.dot.lanes(self.width)
        self.loads = inputs // (2 * self.width)

    def value(self, row: Any, column: Any) -> Expression:
        byte = self.weight[row, column // GROUP * HALF + column % HALF].astype("int32")
        nibble = byte >> (column % GROUP // HALF * 4) & emit.constant(15, "int32")
        return (nibble - emit.constant(8, "int32")).astype("float32") * widened(self.scale[row, column // GROUP])

    def prepare(self, X: Any, tokens: Any, scratch: tuple[Any, Any]) -> Any:
        """Round as ``Int8`` does, and compute −8 · the sum of the activations that each lane multiplies."""
        rounded, steps = scratch
        width, lanes, dot = self.width, self.lanes, self.machine.dot
        eights = tir.Broadcast(emit.constant(8, "int8"), width)
        none = tir.Broadcast(emit.constant(0, "int32"), lanes)

        def put(t: Any, at: Any, whole: Any) -> None:
            load, within = at // (2 * width), at % (2 * width)
            place = within % GROUP // HALF * width + within // GROUP * HALF + within % HALF
            emit.store(rounded, [self.load_of(t, load) + place], whole.astype("int8"))

        with builder.serial(0, tokens) as t, T.sblock("round"):
            round_token(X, t, self.inputs, steps, lambda at, whole: put(t, at, whole))
            with builder.serial(0, self.loads) as i:
                total = none
                for half in self.halves(rounded, t, i):
                    total = dot.accumulate_int4(total, eights, half, width)
                whole = tir.reinterpret(f"int8x{4 * lanes}", none - total)
                builder.buffer_store(rounded, whole, [tir.Ramp(self.load_of(t, i) + 2 * width, 1, 4 * lanes)])
        return scratch

    def load_of(self, token: Any, i: Any) -> Any:
        """Return where the activations of a load begin."""
        return (token * self.loads + i) * (2 * self.width + 4 * self.lanes)

    def halves(self, rounded: Any, token: Any, i: Any) -> list[Any]:
        """Return the activations of a load, those of the low and those of the high halves of the weights' bytes."""
        return [rounded[tir.Ramp(self.load_of(token, i) + j * self.width, 1, self.width)] for j in range(2)]

    def dots(self, rows: list[Any], prepared: Any, tokens: list[Any]) -> list[list[Expression]]:
        rounded, steps = prepared
        width, lanes, dot = self.width, self.lanes, self.machine.dot
        groups = width // HALF
        sums = [[T.sblock_alloc_buffer((lanes,), "float32") for _ in tokens] for _ in rows]
        every = tir.Ramp(0, 1, lanes)
        for total in flat(sums):
            builder.buffer_store(total, tir.Broadcast(emit.constant(0, "float32"), lanes), [every])
        with builder.serial(0, self.loads) as i:
            for r, row in enumerate(rows):
                self.fetch(rows, tokens, r, i * width, width)
                packed = self.weight[row, tir.Ramp(i * width, 1, width)]
                low, high = (packed & of_all(15, width)), packed >> of_all(4, width)
                nibbles = [each.astype(f"int8x{width}") for each in (low, high)]
                scales = self.scales(row, i, groups)
                for token, total in zip(tokens, sums[r], strict=True):
                    start = rounded[tir.Ramp(self.load_of(token, i) + 2 * width, 1, 4 * lanes)]
                    whole = tir.reinterpret(f"int32x{lanes}", start)
                    for half, activations in zip(nibbles, self.halves(rounded, token, i), strict=True):
                        whole = dot.accumulate_int4(whole, half, activations, width)
                    builder.buffer_store(total, total[every] + whole.astype(f"float32x{lanes}") * scales, [every])
        return [
            [whole * steps[token] for token, whole in zip(tokens, of_row, strict=True)]
            for of_row in by_rows(horizontal_sums(flat(sums), lanes), len(tokens))
        ]

    def scales(self, row: Any, i: Any, groups: int) -> Expression:
        """Return the scale of each lane."""
        if groups == 1:
            return tir.Broadcast(widened(self.scale[row, i]), self.lanes)
        found = self.scale[row, tir.Ramp(i * groups, 1, groups)]
        each = self.lanes // groups
        # A shuffle may not have more lanes than its operands together.
        return widened(tir.Shuffle([found] * each, [lane // each for lane in range(self.lanes)]), self.lanes)


def of_all(value: int, width: int) -> Expression:
    return tir.Broadcast(emit.constant(value, "uint8"), width)


def round_token(X: Any, t: Any, inputs: int, steps: Any, put: Callable[[Any, Any], None]) -> None:
    """Emit ``put(i, whole)`` for activation i of token t as a multiple of the token's step, which is stored."""
    width = largest_divisor(inputs, 16)
    largest, poison = (T.sblock_alloc_buffer((width,), "float32") for _ in range(2))
    zero, largest_finite = (emit.constant(value, "float32") for value in (0, 3.4e38))
    emit.lanes(width, (largest, [], lambda _: zero), (poison, [], lambda _: zero))
    with builder.serial(0, inputs // width) as i, builder.vectorized(0, width) as lane:
        x = X[t, i * width + lane]
        emit.store(largest, [lane], tir.max(largest[lane], tir.abs(x)))
        # The comparison may drop NaN.
        emit.store(poison, [lane], tir.Select(tir.abs(x) <= largest_finite, poison[lane], x))
    half = width
    while half > 1:
        half //= 2
        emit.lanes(half, (largest, [], lambda lane: tir.max(largest[lane], largest[lane + half])))  # noqa: B023
    scale = (largest[0] + emit.horizontal_sum(poison, width)) / emit.constant(127, "float32")
    emit.store(steps, [t], scale)
    inverse = T.sblock_alloc_buffer((1,), "float32")
    positive = steps[t] > emit.constant(1e-30, "float32")
    emit.store(inverse, [0], tir.Select(positive, emit.constant(1, "float32") / steps[t], zero))
    with builder.serial(0, inputs // width) as i, builder.vectorized(0, width) as lane:
        at = i * width + lane
        value = X[t, at] * inverse[0]
        in_range = tir.Select(tir.abs(value) < emit.constant(128, "float32"), value, zero)
        put(at, tir.nearbyint(in_range).astype("int32"))
