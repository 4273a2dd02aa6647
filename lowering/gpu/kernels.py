"""The tables of plan functions by op and form of the schedule, one for each compiler."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from typing import Any

from lowering.gpu.plan import Plan


def plan(op: str, schedule: Any, *arguments: Any) -> Plan:
    """Return the launches of an op under a schedule; ``arguments`` are those of the op's plan function."""
    table = _tir() if schedule.compiler == "tir" else _triton()
    return table[op, getattr(schedule, "form", "")](*arguments, schedule)


@cache
def _triton() -> dict[tuple[str, str], Callable[..., Plan]]:
    """Return the plan functions by op and form. Triton is imported here rather than with the module, as it decides on
    import whether kernels are interpreted."""
    from lowering.gpu.address_decode import triton as address_decode
    from lowering.gpu.address_decode import triton_backward as address_decode_backward
    from lowering.gpu.decode_heads import triton as decode_heads
    from lowering.gpu.memory_scan.serial import forward as serial_forward
    from lowering.gpu.memory_scan.slots import backward as slots_backward
    from lowering.gpu.memory_scan.slots import forward as slots_forward
    from lowering.gpu.memory_step import triton as memory_step

    return {
        ("address_decode", ""): address_decode.plan,
        ("address_decode_backward", ""): address_decode_backward.plan,
        ("memory_scan", "serial"): serial_forward.plan,
        ("memory_scan", "slots"): slots_forward.plan,
        ("memory_scan_backward", "slots"): slots_backward.plan,
        ("memory_step", ""): memory_step.plan,
        ("decode_heads", ""): decode_heads.plan,
    }


@cache
def _tir() -> dict[tuple[str, str], Callable[..., Plan]]:
    from lowering.gpu.address_decode import tir as address_decode
    from lowering.gpu.decode_heads import tir as decode_heads
    from lowering.gpu.memory_scan.shared import plan as memory_scan
    from lowering.gpu.memory_step import tir as memory_step

    return {
        ("address_decode", ""): address_decode.plan,
        ("address_decode_backward", ""): address_decode.plan_backward,
        ("memory_scan", "shared"): memory_scan.plan,
        ("memory_scan_backward", "shared"): memory_scan.plan_backward,
        ("memory_step", ""): memory_step.plan,
        ("decode_heads", ""): decode_heads.plan,
    }
