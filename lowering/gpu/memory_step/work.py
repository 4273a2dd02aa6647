"""What the kernels of one token's write and read do, whichever compiler made them: a program owns a head."""

from __future__ import annotations

from typing import Any

from lowering.gpu.plan import Program
from lowering.gpu.resources import Work
from schedules.gpu.shared import BYTES, word
from schedules.workload import Workload


def operand_bytes(heads: int, top_k: int, width: int, size: int) -> int:
    """Of the addresses, values and outputs of all heads, in numbers of ``size`` bytes."""
    return heads * (2 * top_k * (4 + size) + 2 * width * size)


def state_bytes(heads: int, top_k: int, width: int, size: int) -> int:
    """Of rows and masses of all heads: those written are loaded and stored, those read are loaded."""
    return 3 * heads * top_k * (width + 1) * size


def operations(top_k: int, width: int) -> int:
    """Instructions of one head: 7 a channel of the K rows written and read."""
    return 7 * top_k * width


def programs(workload: Workload, schedule: Any) -> tuple[Program, ...]:
    """The launch of TIR's kernel: slots, masses, then rows."""
    N, K, D = (workload.shape[axis] for axis in "NKD")
    moved = operand_bytes(N, K, D, BYTES[workload.dtype]) + state_bytes(N, K, D, word(workload))
    work = Work(
        programs=N, threads=schedule.threads, dram_bytes=moved, cache_bytes=moved, operations=N * operations(K, D),
        trips=5, shared_trips=2, barriers=2,
    )  # fmt: skip
    return (Program("memory_step", (("N", 1),), schedule.threads, work),)
