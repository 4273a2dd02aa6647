"""Compiles workloads for a GPU that this machine need not have, if it has their compilers."""

from __future__ import annotations

import importlib.util
from typing import Any

import torch
from torch import Tensor

from lowering import cache, nvcc
from lowering.gpu.compilers import interpreted
from lowering.gpu.kernels import plan
from lowering.gpu.resources import Compiled
from lowering.targets import Gpu, find, gpu_of
from schedules.gpu.shared import SharedScan, refuse_bytes
from schedules.workload import Workload, heads_of


class NoCompilerError(ValueError):
    """A schedule's compiler does not support the target, or is not installed."""

    status = "no_compiler"


def compile_for(workload: Workload, target: str, schedule: Any) -> list[Compiled]:
    """Compile the launches of ``workload`` on ``target`` under ``schedule``, in the order of execution.

    Raises:
        ValueError: if the target is not a GPU, or the schedule is not valid for the workload.
        NoCompilerError: if the schedule's compiler does not support the target or is not installed.
        RuntimeError: if this process interprets Triton's kernels. Errors of the compilers are not caught.
    """
    gpu = gpu_of(target)
    schedule.require(workload)
    missing = why_unsupported(schedule, target, workload)
    if missing is not None:
        raise NoCompilerError(missing)
    if schedule.compiler == "triton" and interpreted():
        raise RuntimeError("TRITON_INTERPRET is set in this process; compile kernels in a process without it")
    return plan(workload.op, schedule, *arguments(workload)).compile(gpu)


def why_unsupported(schedule: Any, target: str, workload: Workload) -> str | None:
    """Return why this machine cannot compile a schedule for ``target``, or None if it can.

    The schedule is valid for ``workload``, which matters without TIR's compilers: its binaries may be in the cache.
    """
    wanted, served = schedule.compiler, find(target).compilers
    if wanted not in served:
        return f"{wanted} does not compile for {target}; use {' or '.join(served)}"
    missing = _missing_for_tir() if wanted == "tir" else None
    if missing is not None and not _in_cache(schedule, target, workload):
        return missing
    warp = gpu_of(target).warp
    if schedule.threads % warp:
        return f"threads is {schedule.threads}; it must be a multiple of {target}'s warp of {warp} threads"
    return None


def too_large(schedule: Any, workload: Workload, gpu: Gpu) -> str | None:
    """Return why a program of a schedule does not fit into the GPU's shared memory, or None if it does."""
    if not isinstance(schedule, SharedScan):
        return None
    return refuse_bytes(max(schedule.shared_bytes(workload, of) for of in schedule.operands), gpu.shared_block)


def _missing_for_tir() -> str | None:
    if importlib.util.find_spec("tvm") is None:
        return "TIR's kernels need TVM, which is not installed: pip install 'ramnet[tvm]'"
    return nvcc.MISSING if nvcc.nvcc() is None else None


def _in_cache(schedule: Any, target: str, workload: Workload) -> bool:
    launch: Any = plan(workload.op, schedule, *arguments(workload)).launches[0]
    return cache.find(launch.kernels.file(gpu_of(target))) is not None


def arguments(workload: Workload) -> tuple[Any, ...]:
    """Return meta tensors as the arguments of an op's ``plan``; the state has the dtype of sums."""
    values = getattr(torch, workload.dtype)
    sums = torch.float64 if values == torch.float64 else torch.float32
    shape = workload.shape
    K = shape["K"]
    constants = tuple(workload.constants.get(name, 0.0) for name in ("decay_power", "eps"))

    def empty(*sizes: int, dtype: torch.dtype = values) -> Tensor:
        return torch.empty(sizes, dtype=dtype, device="meta")

    if workload.op.startswith("address_decode"):
        R, U, P = shape["R"], shape["U"], shape["P"]
        logits = empty(R, U, P)
        if workload.op == "address_decode":
            return logits, K
        return empty(R, K), logits, empty(R, K, dtype=torch.int32), empty(R, K)
    N, M, D = shape["N"], shape["M"], shape["D"]
    state = empty(N, M, D, dtype=sums), empty(N, M, dtype=sums)
    if workload.op == "decode_heads":
        U, P = shape["U"], shape["P"]
        H = heads_of(workload)
        projected = empty(N // H, 2 * H * U * P + H * D)
        scale, position = empty(2, H), empty(N // H, dtype=torch.int64)
        state = tuple(x.view(N // H, H, *x.shape[1:]) for x in state)
        return projected, scale, position, *state, U, P, K, H // 2, 1.0, *constants
    rows = (N, shape["T"]) if "T" in shape else (N,)
    addresses = empty(*rows, K, dtype=torch.int32), empty(*rows, K)
    inputs = (*addresses, *addresses, empty(*rows, D), *state)
    if workload.op == "memory_scan_backward":
        return empty(*rows, D), *state, *inputs, *constants, workload.constants.get("proxy_eps", 0.0)
    return *inputs, *constants
