"""address_decode and its backward in TIR for GPUs: the CPU's templates with one lane; each thread handles one row."""

from __future__ import annotations

from typing import Any

import tvm
from tvm.script import tirx as T
from tvm.script.ir_builder import tirx as builder

from lowering import emit
from lowering.cpu.address_decode import Decoder
from lowering.cpu.address_decode_backward import differentiate
from lowering.gpu.threads import Threads
from schedules.gpu.address import AddressDecode, AddressDecodeBackward
from schedules.workload import Workload


def module(
    workload: Workload, schedule: AddressDecode, cuda: bool, state: str = "float32", reverse_threads: bool = False
) -> Any:
    """Return the IRModule of address_decode: logits [R, U, P] to slots int32 [R, K] and weights [R, K]. R is dynamic.

    ``state`` is not used, as the op has no state.
    """
    U, P, K = (workload.shape[axis] for axis in "UPK")
    dtype, size = workload.dtype, schedule.threads
    threads = Threads(size, cuda, reverse_threads)

    @T.prim_func(s_tir=True)
    def address_decode(logits: T.handle, slots: T.handle, weights: T.handle):
        T.func_attr({"global_symbol": "address_decode", "tir.noalias": True})
        rows = T.int64()
        X = emit.argument(logits, (rows, U, P), dtype)
        S = emit.argument(slots, (rows, K), "int32")
        W = emit.argument(weights, (rows, K), dtype)
        for b in (
            T.thread_binding((rows + size - 1) // size, thread="blockIdx.x") if cuda
            else T.parallel((rows + size - 1) // size)
        ):  # fmt: skip
            with T.sblock("decode"):
                vb = T.axis.spatial((rows + size - 1) // size, b)
                T.reads(X[0:rows, 0:U, 0:P])
                T.writes(S[0:rows, 0:K], W[0:rows, 0:K])
                _each_row(threads, vb, rows, lambda row: Decoder(
                    workload, 1, schedule.unroll, "local" if cuda else "global").emit(row, X, S, W))  # fmt: skip

    return tvm.IRModule({"address_decode": threads.bound(address_decode)})


def module_backward(
    workload: Workload,
    schedule: AddressDecodeBackward,
    cuda: bool,
    state: str = "float32",
    reverse_threads: bool = False,
) -> Any:  # fmt: skip
    """Return the IRModule of address_decode_backward: grad_weights [R, K], logits [R, U, P], slots int32 [R, K] and
    weights [R, K] to grad_logits [R, U, P]. R is dynamic.

    ``state`` is not used, as the op has no state.
    """
    U, P, K = (workload.shape[axis] for axis in "UPK")
    dtype, size = workload.dtype, schedule.threads
    threads = Threads(size, cuda, reverse_threads)

    @T.prim_func(s_tir=True)
    def address_decode_backward(
        grad_weights: T.handle, logits: T.handle, slots: T.handle, weights: T.handle, grad_logits: T.handle
    ):
        T.func_attr({"global_symbol": "address_decode_backward", "tir.noalias": True})
        rows = T.int64()
        dW = emit.argument(grad_weights, (rows, K), dtype)
        X = emit.argument(logits, (rows, U, P), dtype)
        S = emit.argument(slots, (rows, K), "int32")
        W = emit.argument(weights, (rows, K), dtype)
        dX = emit.argument(grad_logits, (rows, U, P), dtype)
        for b in (
            T.thread_binding((rows + size - 1) // size, thread="blockIdx.x") if cuda
            else T.parallel((rows + size - 1) // size)
        ):  # fmt: skip
            with T.sblock("decode"):
                vb = T.axis.spatial((rows + size - 1) // size, b)
                T.reads(dW[0:rows, 0:K], X[0:rows, 0:U, 0:P], S[0:rows, 0:K], W[0:rows, 0:K])
                T.writes(dX[0:rows, 0:U, 0:P])
                _each_row(threads, vb, rows, lambda row: differentiate(
                    workload, 1, row, dW, X, S, W, dX, "local" if cuda else "global"))  # fmt: skip

    return tvm.IRModule({"address_decode_backward": threads.bound(address_decode_backward)})


def _each_row(threads: Threads, program: Any, rows: Any, body: Any) -> None:
    """Emit ``body(row)`` for each row of a program; the last program may have fewer rows than threads."""

    def mine(thread: Any) -> None:
        row = program * threads.count + thread
        with builder.If(row < rows), builder.Then():
            body(row)

    with threads.program():
        threads.each(mine)
