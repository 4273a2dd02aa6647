"""How a weight matrix is stored, and the dot products of its rows with the activations of tokens."""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import Any, ClassVar, NamedTuple

import tvm
import tvm.tirx as tir
from tvm.script import tirx as T
from tvm.script.ir_builder import tirx as builder

from lowering import emit
from lowering.aot.machines import Machine
from lowering.aot.sums import horizontal_sums
from schedules.base import largest_divisor

Expression = Any
# How far ahead of its use a row is asked for, in bytes, where neighbours take turns: mostly in later rows, which a
# processor's own prefetcher does not expect. On a Sapphire Rapids, a token of "340m" on one thread takes 1.04 times the
# time of reading its weights in float32, 1.15 in bfloat16, 1.06 in int8 and 1.3 in int4; without, it takes 1.06, 1.5,
# 1.2 and 1.9.
AHEAD = 8192
LINE = 64


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
    """A weight [outputs, inputs] in the buffers of ``lowering.aot.weights.storage``.

    Args:
        tiling: the loops of a token that is computed alone, and how many tokens are computed together.

    Attributes:
        default: the loops, unless ``default_tiling`` has rows read one after the other.
        several: the loops of tokens that are computed together.
    """

    default: ClassVar[Tiling] = Tiling()

    def __init__(self, outputs: int, inputs: int, weight: Any, scale: Any, machine: Machine, tiling: Tiling) -> None:
        self.outputs, self.inputs, self.weight, self.scale, self.machine = outputs, inputs, weight, scale, machine
        self.tiling, self.several = tiling, self.usual(machine)._replace(tokens=tiling.tokens)

    @classmethod
    def usual(cls, machine: Machine) -> Tiling:
        """Return ``default`` with the lanes that suit the machine."""
        return cls.default if machine.lanes is None else Tiling(lanes=machine.lanes)

    def prepare(self, X: Any, tokens: Any, scratch: tuple[Any, Any]) -> Any:
        """Emit what is done once to the activations X [tokens, inputs] before ``dots``.

        ``scratch`` are buffers of three int8 for every two activations, and of a float32 for each token.
        """
        return X

    def apart(self, tokens: int) -> bool:
        """Return whether rows of one loop lie far apart in memory, so that each is read as it lies there, which a
        processor's own prefetcher expects.

        On a Zen 4, a token of "tiny" on one thread takes 0.89 of the time that it takes with four neighbours in
        float32, 0.98 in bfloat16, 0.94 in int8 and 0.94 in int4.
        """
        return tokens == 1 and not self.machine.rows_in_turn

    def together(self, i: Any, count: int, tokens: int) -> list[Any]:
        """Return the ``count`` rows of loop i: neighbours, or each of another part of the matrix."""
        first, step = (i, self.outputs // count) if self.apart(tokens) else (i * count, 1)
        return [first + j * step for j in range(count)]

    def fetch(self, rows: list[Any], tokens: list[Any], r: int, column: Any, width: int) -> None:
        """Emit prefetches for the load of ``width`` elements of the weight's buffer at [rows[r], column].

        Rows that are read as they lie need none: with them, a token of "340m" in int8 takes 1.2 to 1.5 times as long on
        a Zen 4.
        """
        size = tvm.DataType(self.weight.dtype).bits // 8
        if len(rows) > 1 and not self.apart(len(tokens)) and width * size >= LINE // 2:
            emit.prefetch(self.weight, [rows[r]], column + AHEAD // size, width)

    @abstractmethod
    def value(self, row: Any, column: Any) -> Expression:
        """Return one element as float32."""

    @abstractmethod
    def dots(self, rows: list[Any], prepared: Any, tokens: list[Any]) -> list[list[Expression]]:
        """Return, for each row, its float32 dot products with each of ``tokens``, all computed in one loop."""


class Float32(Matrix):
    def value(self, row: Any, column: Any) -> Expression:
        return self.weight[row, column]

    def dots(self, rows: list[Any], prepared: Any, tokens: list[Any]) -> list[list[Expression]]:
        lanes = largest_divisor(self.inputs, (self.tiling if len(tokens) == 1 else self.several).lanes)
        sums = [[T.sblock_alloc_buffer((lanes,), "float32") for _ in tokens] for _ in rows]
        for total in flat(sums):
            emit.lanes(lanes, (total, [], lambda _: emit.constant(0, "float32")))
        with builder.serial(0, self.inputs // lanes) as i:
            for r, row in enumerate(rows):
                self.fetch(rows, tokens, r, i * lanes, lanes)
                for token, total in zip(tokens, sums[r], strict=True):
                    with builder.vectorized(0, lanes) as lane:
                        at = i * lanes + lane
                        emit.store(total, [lane], total[lane] + self.value(row, at) * prepared[token, at])
        return by_rows(horizontal_sums(flat(sums), lanes), len(tokens))


class Bfloat16(Float32):
    """Numbers of 16 bits, which are widened in registers."""

    # A token of "340m" takes 3 % longer with 64 lanes, and 10 % with four rows.
    default = Tiling(rows=2, lanes=32)

    def value(self, row: Any, column: Any) -> Expression:
        return widened(self.weight[row, column])


def widened(value: Any, lanes: int = 1) -> Expression:
    """Return bfloat16 numbers, given as uint16, as float32."""
    suffix = f"x{lanes}" if lanes > 1 else ""
    shift = emit.constant(16, "uint32")
    wide = value.astype(f"uint32{suffix}") << (tir.Broadcast(shift, lanes) if lanes > 1 else shift)
    return tir.reinterpret(f"float32{suffix}", wide)


def flat(lists: list[list[Any]]) -> list[Any]:
    return [each for inner in lists for each in inner]


def by_rows(values: list[Any], tokens: int) -> list[list[Any]]:
    """Return values of rows and tokens, in the order of ``flat``, as a list for each row."""
    return [values[at : at + tokens] for at in range(0, len(values), tokens)]
