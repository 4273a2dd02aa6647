"""The largest number of vector lanes."""

from __future__ import annotations

from schedules.workload import Workload

# TVM puts a smaller buffer on the stack, where LLVM can keep it in registers.
REGISTER_BYTES = 1024


def refuse_lanes(lanes: int, workload: Workload) -> str | None:
    """Return a sentence if a vector of ``lanes`` elements does not stay on the stack."""
    size = lanes * (8 if workload.dtype == "float64" else 4)
    if lanes >= 1 and size < REGISTER_BYTES:
        return None
    return f"{lanes} lanes are {size} bytes; they must be in 1..{REGISTER_BYTES - 1}"
