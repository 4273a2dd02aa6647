"""The availability of GPU compilers on this machine."""

from __future__ import annotations

import importlib.util
import os
from typing import Any

from lowering import nvcc
from lowering.targets import find, gpu_of


def why_unsupported(schedule: Any, target: str) -> str | None:
    """Return why this machine cannot compile a schedule for ``target``, for any workload, or None if it can."""
    wanted, served = schedule.compiler, find(target).compilers
    if wanted not in served:
        return f"{wanted} does not compile for {target}; use {' or '.join(served)}"
    if wanted == "tir" and importlib.util.find_spec("tvm") is None:
        return "TIR's kernels need TVM, which is not installed: pip install 'ramnet[tvm]'"
    if wanted == "tir" and nvcc.nvcc() is None:
        return nvcc.MISSING
    warp = gpu_of(target).warp
    if schedule.threads % warp:
        return f"threads is {schedule.threads}; it must be a multiple of {target}'s warp of {warp} threads"
    return None


def interpreted() -> bool:
    """Return whether Triton's interpreter runs kernels, one program after another (TRITON_INTERPRET=1)."""
    return os.environ.get("TRITON_INTERPRET", "").lower() in ("1", "true", "yes", "on", "y")
