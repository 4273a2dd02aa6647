"""LayerNorm and matrix products of a block of tokens."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import tvm.tirx as tir
from tvm.script import tirx as T
from tvm.script.ir_builder import tirx as builder

from lowering import emit
from lowering.aot.matrix import Matrix
from schedules.base import largest_divisor

_F32 = "float32"


def norm(n: Any, X: Any, gain_and_bias: tuple[Any, Any], Y: Any, norm_eps: float) -> None:
    """Emit Y = LayerNorm(X) of n tokens. The variance is the mean of squared differences from the mean."""
    gain, bias = gain_and_bias
    C = int(X.shape[1])
    width, size = largest_divisor(C, 32), emit.constant(C, _F32)

    with builder.serial(0, n) as t, T.sblock("norm"):
        sums, mean, scale = (T.sblock_alloc_buffer((k,), _F32) for k in (width, 1, 1))

        def total(value: Callable[[Any], Any]) -> Any:
            emit.lanes(width, (sums, [], lambda _: emit.constant(0, _F32)))
            with builder.serial(0, C // width) as i, builder.vectorized(0, width) as lane:
                emit.store(sums, [lane], sums[lane] + value(i * width + lane))
            return emit.horizontal_sum(sums, width)

        emit.store(mean, [0], total(lambda i: X[t, i]) / size)
        variance = total(lambda i: (X[t, i] - mean[0]) * (X[t, i] - mean[0])) / size
        emit.store(scale, [0], emit.constant(1, _F32) / tir.sqrt(variance + emit.constant(norm_eps, _F32)))
        emit.row(Y, [t], C, lambda i: (X[t, i] - mean[0]) * scale[0] * gain[i] + bias[i], 32)


def product(matrix: Matrix, X: Any, p: Any, put: Callable[[Any, Any, Any], None]) -> None:
    """Emit ``put(t, i, dot)`` for every token t and output i, where dot is the product of X[t] and row i of the matrix.

    ``p`` has the function's ``n``, ``rounded`` and ``steps``. X may have more columns than the matrix has inputs.
    """
    # Divisors, so that blocks do not overlap: ``put`` may add to its output in place.
    block = largest_divisor(matrix.outputs, max(matrix.tiling.rows, matrix.several.rows))
    tokens = matrix.several.tokens
    prepared = matrix.prepare(X, p.n, (p.rounded, p.steps))

    def tiles(b: Any, rows: int, which: list[Any]) -> None:
        together = largest_divisor(block, rows)
        with builder.serial(0, block // together) as r:
            these = matrix.together(b * (block // together) + r, together, len(which))
            for row, dots in zip(these, matrix.dots(these, prepared, which), strict=True):
                for token, dot in zip(which, dots, strict=True):
                    put(token, row, dot)

    with builder.parallel(0, matrix.outputs // block) as b, T.sblock("product"):
        with builder.serial(0, p.n // tokens) as g, T.sblock("tokens"):
            tiles(b, matrix.several.rows, [g * tokens + j for j in range(tokens)])
        with builder.serial(0, p.n % tokens) as j, T.sblock("token"):
            tiles(b, matrix.tiling.rows, [p.n // tokens * tokens + j])
