"""The scan at the training length on this machine's GPU, against the reference in float64."""

from __future__ import annotations

from functools import cache
from typing import Any

import pytest
import torch
from torch import Tensor

from autotune.bench.gpu.kit_kernels import TESTED, TESTED_CONSTANTS
from autotune.bench.gpu.scan import untuned
from lowering.gpu.backend import GpuKernels
from ramnet.ops import reference
from schedules.base import Schedule
from schedules.gpu import SCHEDULES
from schedules.workload import Workload
from tests.gpu.conftest import DEVICE
from tests.samples import TOLERANCE, as_backends_take, cotangents, relative_rmse, scan_inputs

# B, H, T, K, M, D, and γ, ε, ε': those for which the kit has binaries of form "shared".
(SIZES, ODD), CONSTANTS = TESTED, tuple(TESTED_CONSTANTS.values())
DTYPES = [torch.float32, torch.bfloat16, torch.float16, torch.float64]
FORMS = ["serial", "slots", "chosen"]


@cache
def problem(sizes: tuple[int, ...], dtype: torch.dtype, access: str) -> tuple[list[Tensor], list[Tensor]]:
    """Return inputs of the scan, and gradients of its results."""
    state = torch.promote_types(dtype, torch.float32)
    inputs = scan_inputs(*sizes, dtype=dtype, state_dtype=state, access=access)
    return list(inputs.values()), cotangents(inputs)


@cache
def expected(sizes: tuple[int, ...], dtype: torch.dtype, access: str) -> list[Tensor]:
    """Return results and gradients in float64 of the same rounded inputs."""
    inputs, grads = ([wide(x) for x in part] for part in problem(sizes, dtype, access))
    return both(reference, inputs, grads)


def wide(tensor: Tensor) -> Tensor:
    return tensor.double() if tensor.is_floating_point() else tensor


def kernels(target: str, form: str, sizes: tuple[int, ...], dtype: torch.dtype) -> GpuKernels:
    """Return a backend that runs one form of the scan or, for "chosen" and where there is no such form, the recorded
    schedule."""
    if form == "chosen":
        return GpuKernels(target)
    batch, heads, tokens, top_k, slots, dim = sizes
    shape = {"N": batch * heads, "T": tokens, "K": top_k, "M": slots, "D": dim}
    named: Any = str(dtype).removeprefix("torch.")
    given: dict[str, Schedule] = {
        op: untuned(Workload(op=op, shape=shape, dtype=named), form)
        for op in ("memory_scan", "memory_scan_backward") if form in SCHEDULES[op]
    }  # fmt: skip
    return GpuKernels(target, given=given)


def both(backend: Any, inputs: list[Tensor], grads: list[Tensor]) -> list[Tensor]:
    given = as_backends_take(inputs)
    forward = backend.memory_scan(*given, *CONSTANTS)
    return [*forward, *backend.memory_scan_backward(tuple(grads), *given, *CONSTANTS)]


def on_device(scan: GpuKernels, inputs: list[Tensor], grads: list[Tensor]) -> list[Tensor]:
    return both(scan, [x.to(DEVICE) for x in inputs], [x.to(DEVICE) for x in grads])


@pytest.mark.parametrize("sizes", [SIZES, ODD], ids=["even", "odd"])
@pytest.mark.parametrize("dtype", DTYPES, ids=lambda dtype: str(dtype).removeprefix("torch."))
@pytest.mark.parametrize("form", FORMS)
def test_results_and_gradients(target: str, form: str, dtype: torch.dtype, sizes: tuple[int, ...]) -> None:
    found = on_device(kernels(target, form, sizes, dtype), *problem(sizes, dtype, "uniform"))
    for mine, right in zip(found, expected(sizes, dtype, "uniform"), strict=True):
        assert relative_rmse(mine.cpu(), right) < TOLERANCE[dtype]


@pytest.mark.parametrize("access", ["hot", "saturated"])
@pytest.mark.parametrize("form", FORMS)
def test_frequent_slots_and_weights_of_one(target: str, form: str, access: str) -> None:
    found = on_device(kernels(target, form, SIZES, torch.float32), *problem(SIZES, torch.float32, access))
    for mine, right in zip(found, expected(SIZES, torch.float32, access), strict=True):
        assert relative_rmse(mine.cpu(), right) < TOLERANCE[torch.float32]


@pytest.mark.parametrize("form", FORMS)
def test_two_runs_give_the_same_bits_wherever_they_write(target: str, form: str) -> None:
    sizes = (4, 16, *SIZES[2:])
    inputs, grads = problem(sizes, torch.bfloat16, "hot")
    scan = kernels(target, form, sizes, torch.bfloat16)
    first = on_device(scan, inputs, grads)
    # Make the allocator return other memory, filled with NaN.
    noise = [torch.full_like(x, torch.nan, dtype=torch.float32) for x in first]
    del noise
    for again in (on_device(scan, inputs, grads) for _ in range(3)):
        assert all(torch.equal(a, b) for a, b in zip(first, again, strict=True))
