"""memory_step in TIR for GPUs: one program per head; each thread handles some channels of the K rows."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import tvm
from tvm.script import tirx as T
from tvm.script.ir_builder import tirx as builder

from lowering import emit
from lowering.emit import Emit
from lowering.gpu.threads import Threads
from schedules.gpu.step import MemoryStep
from schedules.workload import Workload


def module(
    workload: Workload, schedule: MemoryStep, cuda: bool, state: str = "float32", reverse_threads: bool = False
) -> Any:
    """Return the kernel's IRModule.

    Its parameters are write_slots, write_weights, read_slots, read_weights [N, K], values [N, D], memory [N, M, D] and
    mass [N, M] of dtype ``state``, which are updated in place, and output [N, D]. N is dynamic.
    """
    K, M, D = (workload.shape[axis] for axis in "KMD")
    dtype = workload.dtype
    threads = Threads(schedule.threads, cuda, reverse_threads)

    @T.prim_func(s_tir=True)
    def memory_step(
        write_slots: T.handle, write_weights: T.handle, read_slots: T.handle, read_weights: T.handle,
        values: T.handle, memory: T.handle, mass: T.handle, output: T.handle,
    ):  # fmt: skip
        T.func_attr({"global_symbol": "memory_step", "tir.noalias": True})
        N = T.int64()
        WS, W, RS, R = emit.accesses((write_slots, write_weights, read_slots, read_weights), (N, K), dtype)
        V = emit.argument(values, (N, D), dtype)
        S = emit.argument(memory, (N, M, D), state)
        Z = emit.argument(mass, (N, M), state)
        O = emit.argument(output, (N, D), dtype)
        for n in T.thread_binding(N, thread="blockIdx.x") if cuda else T.parallel(N):
            with T.sblock("step"):
                vn = T.axis.spatial(N, n)
                T.reads(WS[vn, 0:K], W[vn, 0:K], RS[vn, 0:K], R[vn, 0:K], V[vn, 0:D], S[vn, 0:M, 0:D], Z[vn, 0:M])
                T.writes(O[vn, 0:D], S[vn, 0:M, 0:D], Z[vn, 0:M])
                with threads.program():
                    _head(workload, threads, vn, (WS, W, RS, R), V, S, Z, O)

    return tvm.IRModule({"memory_step": threads.bound(memory_step)})


def _head(workload: Workload, threads: Threads, n: Any, operands: tuple[Any, ...], V: Any, S: Any, Z: Any,
          O: Any) -> None:  # fmt: skip
    WS, W, RS, R = operands
    by_k = (lambda k: WS[n, k], lambda k: W[n, k], lambda k: RS[n, k], lambda k: R[n, k])
    token(workload, threads, n, by_k, lambda d: V[n, d], S, Z, lambda d, total: emit.store(O, [n, d], total))


def token(workload: Workload, threads: Threads, n: Any, operands: tuple[Emit, Emit, Emit, Emit], value: Emit, S: Any,
          Z: Any, give: Callable[[Any, Any], None]) -> None:  # fmt: skip
    """Emit the token of head ``n``, which is one or two indices: first the mass by slots, then the rows by channels.

    ``operands`` return write slot, write weight, read slot and read weight for k. ``value`` returns the value of a
    channel, and ``give`` takes its output.
    """
    K, D, sums = workload.shape["K"], workload.shape["D"], emit.sum_type(workload.dtype)
    gamma, eps = workload.constants["decay_power"], emit.constant(workload.constants["eps"], sums)
    write_slots, read_slots = (threads.shared((K,), "int32") for _ in range(2))
    weights, decays, factors = (threads.shared((K,), sums) for _ in range(3))
    write_slot, write_weight, read_slot, read_weight = operands
    head = n if isinstance(n, tuple) else (n,)

    def write_mass(k: Any) -> None:
        emit.store(write_slots, [k], write_slot(k))
        emit.store(read_slots, [k], read_slot(k))
        emit.store(weights, [k], write_weight(k).astype(sums))
        emit.store(decays, [k], emit.decay(weights[k], gamma, sums))
        grown = decays[k] * Z[(*head, write_slots[k])].astype(sums) + weights[k]
        emit.store(Z, [*head, write_slots[k]], grown.astype(Z.dtype))

    def read_mass(k: Any) -> None:
        emit.store(factors, [k], read_weight(k).astype(sums) / (Z[(*head, read_slots[k])].astype(sums) + eps))

    def rows(d: Any) -> None:
        added, total = (emit.registers(threads.cuda, 1, sums) for _ in range(2))
        old = emit.registers(threads.cuda, K, sums)
        emit.store(added, [0], value(d).astype(sums))
        with builder.unroll(0, K) as k:
            emit.store(old, [k], S[(*head, write_slots[k], d)].astype(sums))
        with builder.unroll(0, K) as k:
            emit.store(S, [*head, write_slots[k], d], (decays[k] * old[k] + weights[k] * added[0]).astype(S.dtype))
        emit.store(total, [0], emit.constant(0, sums))
        with builder.unroll(0, K) as k:
            emit.store(total, [0], total[0] + factors[k] * S[(*head, read_slots[k], d)].astype(sums))
        give(d, total[0].astype(workload.dtype))

    threads.spread(K, write_mass)
    threads.barrier()
    threads.spread(K, read_mass)
    threads.barrier()
    threads.spread(D, rows)
