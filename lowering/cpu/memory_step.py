"""memory_step in TIR: one token of the scan, in place. Each head accesses only its addressed rows."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import tvm
from tvm.script import tirx as T
from tvm.script.ir_builder import tirx as builder

from lowering import emit
from ramnet.ops.accesses import Accesses
from schedules.cpu import MemoryStep
from schedules.workload import Workload


def module(workload: Workload, schedule: MemoryStep) -> Any:
    """Return the kernel's IRModule.

    Its parameters are write_slots, write_weights, read_slots, read_weights [B, H, K], values [B, H, D], memory
    [B, H, M, D] and mass [B, H, M], which are updated in place, and output [B, H, D]. B and H are dynamic, and separate
    because flattening them would make a call from Python take 28 µs instead of 10.

    The kernel raises RuntimeError (``emit.OUT_OF_RANGE``) for a slot outside 0..M-1, before anything is written.
    """
    K, M, D = (workload.shape[axis] for axis in "KMD")
    dtype = workload.dtype
    loop = T.parallel if schedule.parallel else T.serial

    @T.prim_func(s_tir=True)
    def memory_step(
        write_slots: T.handle, write_weights: T.handle, read_slots: T.handle, read_weights: T.handle,
        values: T.handle, memory: T.handle, mass: T.handle, output: T.handle,
    ):  # fmt: skip
        T.func_attr({"global_symbol": "memory_step", "tir.noalias": True})
        B = T.int64()
        H = T.int64()
        WS = emit.argument(write_slots, (B, H, K), "int32")
        W = emit.argument(write_weights, (B, H, K), dtype)
        RS = emit.argument(read_slots, (B, H, K), "int32")
        R = emit.argument(read_weights, (B, H, K), dtype)
        V = emit.argument(values, (B, H, D), dtype)
        S = emit.argument(memory, (B, H, M, D), dtype)
        Z = emit.argument(mass, (B, H, M), dtype)
        O = emit.argument(output, (B, H, D), dtype)
        with T.sblock("check"):
            assert emit.slots_in_range((WS, RS), B * H, K, M, lambda n: [n // H, n % H]), emit.OUT_OF_RANGE
        for n in loop(B * H):
            with T.sblock("step"):
                vn = T.axis.spatial(B * H, n)
                T.reads(WS[0:B, 0:H, 0:K], W[0:B, 0:H, 0:K], RS[0:B, 0:H, 0:K], R[0:B, 0:H, 0:K],
                        V[0:B, 0:H, 0:D], S[0:B, 0:H, 0:M, 0:D], Z[0:B, 0:H, 0:M])  # fmt: skip
                T.writes(O[0:B, 0:H, 0:D], S[0:B, 0:H, 0:M, 0:D], Z[0:B, 0:H, 0:M])
                _prefetch_later(schedule, (vn, B * H, H), (WS, RS), (S, Z))
                here = [vn // H, vn % H]
                token(workload, schedule, Places(here, here, here), Accesses(WS, W, RS, R), V, (S, Z), O)

    return tvm.IRModule({"memory_step": memory_step})


def _prefetch_later(
    schedule: MemoryStep, which: tuple[Any, Any, Any], slots: tuple[Any, Any], state: tuple[Any, Any]
) -> None:
    """Emit prefetches for a later head; ``which`` is the head's index in B·H, B·H and H."""
    n, heads, H = which
    if schedule.prefetch:
        later = tvm.tirx.min(n + schedule.prefetch, heads - 1)
        at = [later // H, later % H]
        for each in slots:
            prefetch(schedule, int(each.shape[-1]), lambda k, each=each: each[(*at, k)], at, state)  # type: ignore[misc]


class Places(NamedTuple):
    """Where a head's token is, as leading indices into the buffers of ``token``."""

    accesses: list[Any]
    values: list[Any]  # and the output
    state: list[Any]


def prefetch(
    schedule: MemoryStep, top_k: int, slot_of: Callable[[Any], Any], at: list[Any], state: tuple[Any, Any]
) -> None:
    """Emit prefetches of a head's rows of memory and mass at K slots."""
    S, Z = state

    def ask(k: Any) -> None:
        slot = slot_of(k)
        emit.prefetch(Z, at, slot, 1)
        emit.prefetch(S, [*at, slot], 0, int(S.shape[-1]))

    emit.each_slot(top_k, schedule.unroll, ask)


def token(
    workload: Workload, schedule: MemoryStep, places: Places, accesses: Accesses, V: Any, state: tuple[Any, Any], O: Any
) -> None:
    """Emit the token of one head. ``state`` is memory and mass."""
    (WS, W, RS, R), (S, Z) = accesses, state
    at, values, here = places
    K, D, dtype, tile, unroll = workload.shape["K"], workload.shape["D"], workload.dtype, schedule.tile, schedule.unroll
    gamma, eps = workload.constants["decay_power"], workload.constants["eps"]
    decays, factors = (T.sblock_alloc_buffer((K,), dtype) for _ in range(2))

    def write_mass(k: Any) -> None:
        slot = WS[(*at, k)]
        emit.store(decays, [k], emit.decay(W[(*at, k)], gamma, dtype))
        emit.store(Z, [*here, slot], decays[k] * Z[(*here, slot)] + W[(*at, k)])

    def read_mass(k: Any) -> None:
        emit.store(factors, [k], R[(*at, k)] / (Z[(*here, RS[(*at, k)])] + emit.constant(eps, dtype)))

    emit.each_slot(K, unroll, write_mass)
    emit.each_slot(K, unroll, read_mass)
    with builder.serial(0, D // tile) as q:

        def write_row(k: Any) -> None:
            slot = WS[(*at, k)]
            emit.tiles(
                S,
                [*here, slot],
                q * tile,
                tile,
                lambda d: decays[k] * S[(*here, slot, d)] + W[(*at, k)] * V[(*values, d)],
            )

        emit.each_slot(K, unroll, write_row)
        emit.sum_slots(
            K,
            unroll,
            lambda k: lambda d: factors[k] * S[(*here, RS[(*at, k)], d)],
            lambda value: emit.tiles(O, values, q * tile, tile, value),
            lambda d: O[(*values, d)],
        )
