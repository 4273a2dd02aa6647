"""How a weight matrix is stored, and the dot products of its rows with the activations of tokens.

Weights of 16 bits are widened in registers. Integer weights are multiplied with activations that are rounded to int8,
with one scale per token, by the processor's integer dot products; sums of integers are exact.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import Any, ClassVar, NamedTuple

import tvm.tirx as tir
from tvm.script import tirx as T
from tvm.script.ir_builder import tirx as builder

from lowering import emit
from lowering.aot.machines import Machine
from schedules.base import largest_divisor

Expression = Any


class Tiling(NamedTuple):
    """How a matrix product is cut into loops.

    Attributes:
        rows: outputs that are computed in one loop, which share the loads of activations.
        tokens: tokens that are computed in one loop, which share the loads of weights; the rest are done one by one.
        lanes: partial sums of a dot product of floating numbers.
    """

    rows: int = 4
    tokens: int = 4
    lanes: int = 16


class Matrix(ABC):
    """A weight in the buffer ``weight`` [outputs, inputs], with its scales in ``scale`` if it is of integers."""

    dtype: ClassVar[str]  # of the weight's buffer
    default: ClassVar[Tiling] = Tiling()

    def __init__(self, weight: Any, scale: Any, machine: Machine, tiling: Tiling | None = None) -> None:
        self.weight, self.scale, self.machine = weight, scale, machine
        self.tiling = tiling or (Tiling(lanes=machine.lanes) if machine.lanes is not None else self.default)
        self.outputs, self.inputs = (int(size) for size in weight.shape)

    def prepare(self, X: Any, tokens: Any, scratch: tuple[Any, Any]) -> Any:
        """Emit what is done once to the activations X [tokens, inputs] before ``dots``.

        ``scratch`` are buffers of an int8 for each activation, and of a float32 for each token.
        """
        return X

    @abstractmethod
    def value(self, row: Any, column: Any) -> Expression:
        """Return one element as float32."""

    @abstractmethod
    def dots(self, rows: list[Any], prepared: Any, tokens: list[Any]) -> list[list[Expression]]:
        """Return, for each row, its float32 dot products with each of ``tokens``, all computed in one loop."""


class Float32(Matrix):
    dtype = "float32"

    def value(self, row: Any, column: Any) -> Expression:
        return self.weight[row, column]

    def dots(self, rows: list[Any], prepared: Any, tokens: list[Any]) -> list[list[Expression]]:
        lanes = largest_divisor(self.inputs, self.tiling.lanes)
        sums = [[T.sblock_alloc_buffer((lanes,), "float32") for _ in tokens] for _ in rows]
        for total in flat(sums):
            emit.lanes(lanes, (total, [], lambda _: emit.constant(0, "float32")))
        with builder.serial(0, self.inputs // lanes) as i:
            for row, of_row in zip(rows, sums, strict=True):
                for token, total in zip(tokens, of_row, strict=True):
                    with builder.vectorized(0, lanes) as lane:
                        at = i * lanes + lane
                        emit.store(total, [lane], total[lane] + self.value(row, at) * prepared[token, at])
        return [[emit.horizontal_sum(total, lanes) for total in of_row] for of_row in sums]


class Bfloat16(Float32):
    dtype = "uint16"
    # One long row at a time: a token of "340m" takes 32 ms, and 43 with four rows of 16 lanes.
    default = Tiling(rows=1, lanes=64)

    def value(self, row: Any, column: Any) -> Expression:
        wide = self.weight[row, column].astype("uint32") << emit.constant(16, "uint32")
        return tir.reinterpret("float32", wide)


class Int8(Matrix):
    """Symmetric int8 with one float32 scale per row."""

    dtype = "int8"

    def value(self, row: Any, column: Any) -> Expression:
        return self.weight[row, column].astype("float32") * self.scale[row]

    def prepare(self, X: Any, tokens: Any, scratch: tuple[Any, Any]) -> Any:
        """Round each token's activations to a multiple of its step, their largest magnitude / 127."""
        width = largest_divisor(self.inputs, 16)
        rounded, steps = scratch
        offset = self.machine.dot.offset
        with builder.serial(0, tokens) as t, T.sblock("round"):
            largest, poison = (T.sblock_alloc_buffer((width,), "float32") for _ in range(2))
            zero, largest_finite = (emit.constant(value, "float32") for value in (0, 3.4e38))
            emit.lanes(width, (largest, [], lambda _: zero), (poison, [], lambda _: zero))
            with builder.serial(0, self.inputs // width) as i, builder.vectorized(0, width) as lane:
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
            with builder.serial(0, self.inputs // width) as i, builder.vectorized(0, width) as lane:
                at = i * width + lane
                value = X[t, at] * inverse[0]
                in_range = tir.Select(tir.abs(value) < emit.constant(128, "float32"), value, zero)
                whole = tir.nearbyint(in_range).astype("int32") + emit.constant(offset, "int32")
                emit.store(rounded, [t * self.inputs + at], whole.astype("int8"))
        return scratch

    def dots(self, rows: list[Any], prepared: Any, tokens: list[Any]) -> list[list[Expression]]:
        rounded, steps = prepared
        dot = self.machine.dot
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
                weights = self.weight[row, at]
                for token, total in zip(tokens, sums[r], strict=True):
                    activations = rounded[tir.Ramp(token * self.inputs + i * width, 1, width)]
                    value = dot.accumulate(total[every], activations, weights, width)
                    builder.buffer_store(total, value, [every])
                if excess:
                    offsets = tir.Broadcast(emit.constant(dot.offset - 256, "int8"), width)
                    value = dot.accumulate(excess[r][every], offsets, weights, width)
                    builder.buffer_store(excess[r], value, [every])
        results = []
        for r, row in enumerate(rows):
            less = [emit.horizontal_sum(excess[r], lanes)] if excess else []
            of_row = []
            for token, total in zip(tokens, sums[r], strict=True):
                whole = emit.horizontal_sum(total, lanes)
                exact = whole - less[0] if less else whole
                of_row.append(exact.astype("float32") * (self.scale[row] * steps[token]))
            results.append(of_row)
        return results


FORMATS: dict[str, type[Matrix]] = {"float32": Float32, "bfloat16": Bfloat16, "int8": Int8}


def flat(lists: list[list[Any]]) -> list[Any]:
    return [each for inner in lists for each in inner]
