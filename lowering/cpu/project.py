"""project in TIR: a linear layer without bias on one token, y = W x, bound by the memory bandwidth of reading W."""

from __future__ import annotations

from typing import Any

import tvm
from tvm.script import tirx as T
from tvm.script.ir_builder import tirx as builder

from lowering import emit
from schedules.cpu import Project
from schedules.workload import Workload


def module(workload: Workload, schedule: Project) -> Any:
    """Return the kernel's IRModule. Its parameters are weight [O, I], x [I] and the output y [O]."""
    outputs, inputs = workload.shape["O"], workload.shape["I"]
    dtype, rows, lanes = workload.dtype, schedule.rows, schedule.lanes
    blocks = (outputs + rows - 1) // rows

    @T.prim_func(s_tir=True)
    def project(weight: T.handle, x: T.handle, y: T.handle):
        T.func_attr({"global_symbol": "project", "tir.noalias": True})
        W = emit.argument(weight, (outputs, inputs), dtype)
        X = emit.argument(x, (inputs,), dtype)
        Y = emit.argument(y, (outputs,), dtype)
        for b in T.serial(blocks):
            with T.sblock("rows"):
                vb = T.axis.spatial(blocks, b)
                T.reads(W[0:outputs, 0:inputs], X[0:inputs])
                T.writes(Y[0:outputs])
                first = T.sblock_alloc_buffer((1,), "int32")
                # The last block starts early and computes some rows again instead of exceeding the end.
                first[0] = T.min(vb * rows, outputs - rows)
                _block(first[0], rows, lanes, inputs, W, X, Y)

    plan = tvm.s_tir.Schedule(project)
    if schedule.parallel:
        plan.parallel(*plan.get_loops(plan.get_sblock("rows")))
    return plan.mod


def _block(first: Any, rows: int, lanes: int, inputs: int, W: Any, X: Any, Y: Any) -> None:
    for j, dot in enumerate(dots(W, [first + j for j in range(rows)], X, inputs, lanes)):
        emit.store(Y, [first + j], dot)


def dots(W: Any, rows: list[Any], X: Any, inputs: int, lanes: int) -> list[Any]:
    """Return the dot products of ``rows`` of W with X, computed in one loop with ``lanes`` partial sums per row."""
    sums = [T.sblock_alloc_buffer((lanes,), W.dtype) for _ in rows]
    for total in sums:
        emit.lanes(lanes, (total, [], lambda _: emit.constant(0, W.dtype)))
    with builder.serial(0, inputs // lanes) as i:
        for row, total in zip(rows, sums, strict=True):
            with builder.vectorized(0, lanes) as lane:
                at = i * lanes + lane
                emit.store(total, [lane], total[lane] + W[row, at] * X[at])
    return [emit.horizontal_sum(total, lanes) for total in sums]
