"""The template of each op: ``module(workload, schedule)`` returns an IRModule with a function of the op's name."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from lowering.cpu import (
    address_decode,
    address_decode_backward,
    memory_scan,
    memory_scan_backward,
    memory_step,
)
from schedules.workload import Op

TEMPLATES: dict[Op, Callable[..., Any]] = {
    "address_decode": address_decode.module,
    "address_decode_backward": address_decode_backward.module,
    "memory_scan": memory_scan.module,
    "memory_scan_backward": memory_scan_backward.module,
    "memory_step": memory_step.module,
}
