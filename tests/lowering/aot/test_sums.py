"""Horizontal sums of several vectors."""

from __future__ import annotations

import numpy as np
import pytest

tvm = pytest.importorskip("tvm", reason="the library needs tvm: pip install 'ramnet[tvm]'")

from tvm.script import tirx as T  # noqa: E402
from tvm.script.ir_builder import IRBuilder  # noqa: E402
from tvm.script.ir_builder import tirx as builder  # noqa: E402

from lowering import emit  # noqa: E402
from lowering.aot.sums import horizontal_sums  # noqa: E402


@pytest.mark.parametrize(
    "count, width", [(0, 16), (1, 16), (2, 16), (4, 16), (16, 16), (16, 4), (8, 64), (3, 16), (4, 12), (4, 1)]
)
def test_each_sum_is_that_of_its_own_vector(count: int, width: int) -> None:
    with IRBuilder() as made, builder.prim_func(s_tir=True):
        builder.func_name("main")
        handles = [builder.arg(name, T.handle()) for name in ("x", "y")]
        x, y = (
            emit.argument(each, shape, "float32")
            for each, shape in zip(handles, ((count, width), (count,)), strict=True)
        )
        with T.sblock("root"):
            vectors = [T.sblock_alloc_buffer((width,), "float32") for _ in range(count)]
            for row, vector in enumerate(vectors):
                emit.row(vector, [], width, lambda lane, row=row: x[row, lane])
            for row, total in enumerate(horizontal_sums(vectors, width)):
                emit.store(y, [row], total)
    executable = tvm.compile(made.get(), target="llvm")
    given = np.random.default_rng(0).integers(-1000, 1000, (count, width)).astype("float32")  # whose sums are exact
    found = tvm.runtime.empty((count,), "float32")
    executable["main"](tvm.runtime.tensor(given), found)
    np.testing.assert_array_equal(found.numpy(), given.sum(1))
