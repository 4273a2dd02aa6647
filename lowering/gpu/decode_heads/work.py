"""What the kernels of a layer's token do, whichever compiler made them: a program owns a head."""

from __future__ import annotations

from typing import Any

from lowering.gpu.address_decode.work import decode_operations
from lowering.gpu.memory_step.work import operations, state_bytes
from lowering.gpu.plan import Program
from lowering.gpu.resources import Work
from schedules.gpu.shared import BYTES, word
from schedules.workload import Workload

_WARP = 32


def operand_bytes(heads: int, order: int, sub_dim: int, width: int, size: int) -> int:
    """Of the projected token and the outputs of all heads, in numbers of ``size`` bytes."""
    return heads * (2 * order * sub_dim + 2 * width) * size


def address_operations(lanes: int, order: int, sub_dim: int, top_k: int, unroll: int) -> int:
    """Instructions of one head that find its addresses on so many lanes, each a query's or a key's, or idle."""
    return lanes * decode_operations(order, sub_dim, top_k, unroll)


def programs(workload: Workload, schedule: Any) -> tuple[Program, ...]:
    """The launch of TIR's kernel: two threads of a program decode, one after another's logits, then come masses and
    rows as in a step."""
    N, U, P, K, D = (workload.shape[axis] for axis in "NUPKD")
    moved = operand_bytes(N, U, P, D, BYTES[workload.dtype]) + state_bytes(N, K, D, word(workload))
    # A warp issues an instruction for all its lanes, whether two of them work or all.
    addresses = address_operations(_WARP, U, P, K, schedule.unroll)
    work = Work(
        programs=N, threads=schedule.threads, dram_bytes=moved, cache_bytes=moved,
        operations=N * (addresses + operations(K, D)), trips=5, shared_trips=2 + U, barriers=5,
    )  # fmt: skip
    return (Program("decode_heads", (("B", 1), ("H", 1)), schedule.threads, work),)
