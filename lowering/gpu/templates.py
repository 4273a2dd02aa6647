"""Which TIR template an op has for GPUs, and the launches of its kernels."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from lowering.gpu.address_decode import work as address_decode
from lowering.gpu.decode_heads import work as decode_heads
from lowering.gpu.memory_scan.shared import work as memory_scan
from lowering.gpu.memory_step import work as memory_step
from lowering.gpu.plan import Program
from schedules.workload import Op, Workload

_PROGRAMS: dict[Op, Callable[[Workload, Any], tuple[Program, ...]]] = {
    "address_decode": address_decode.programs,
    "address_decode_backward": address_decode.programs,
    "memory_scan": memory_scan.programs,
    "memory_scan_backward": memory_scan.programs_backward,
    "memory_step": memory_step.programs,
    "decode_heads": decode_heads.programs,
}


def template(
    workload: Workload, schedule: Any, cuda: bool, state: str = "float32", reverse_threads: bool = False
) -> Any:
    """The IRModule of an op's kernels for a GPU, or of the same programs as loops on the CPU.

    Args:
        state: the type of memory and mass.
        reverse_threads: the CPU's loops over threads go from the last to the first.

    Raises:
        ValueError: for an op that has no template.
        ImportError: without TVM.
    """
    from lowering.gpu.address_decode import tir as address_decode
    from lowering.gpu.decode_heads import tir as decode_heads
    from lowering.gpu.memory_scan.shared import backward, forward
    from lowering.gpu.memory_step import tir as memory_step

    modules: dict[Op, Callable[..., Any]] = {
        "address_decode": address_decode.decode,
        "address_decode_backward": address_decode.differentiate_rows,
        "memory_scan": forward.module,
        "memory_scan_backward": backward.module,
        "memory_step": memory_step.module,
        "decode_heads": decode_heads.module,
    }
    require(workload.op)
    return modules[workload.op](workload, schedule, cuda, state, reverse_threads)


def programs(workload: Workload, schedule: Any) -> tuple[Program, ...]:
    """The launches of an op, in order; ValueError for an op that has no template."""
    require(workload.op)
    return _PROGRAMS[workload.op](workload, schedule)


def require(op: str) -> None:
    """ValueError for an op that has no template."""
    if op not in _PROGRAMS:
        raise ValueError(f"{op} has no TIR kernel for a GPU; there are {', '.join(sorted(_PROGRAMS))}")
