"""How many rows, or sums, a vector may hold."""

from __future__ import annotations

from schedules.workload import Workload

# TVM keeps a smaller buffer on the stack, where LLVM finds registers for it.
REGISTER_BYTES = 1024


def refuse_lanes(lanes: int, workload: Workload) -> str | None:
    """A sentence where a vector of ``lanes`` rows is no register."""
    size = lanes * (8 if workload.dtype == "float64" else 4)
    if lanes >= 1 and size < REGISTER_BYTES:
        return None
    return f"{lanes} lanes are {size} bytes; they must be in 1..{REGISTER_BYTES - 1}"
