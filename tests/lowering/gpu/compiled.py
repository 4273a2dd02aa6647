"""Compiles kernels for tests in a process that interprets them.

A process either interprets kernels or compiles them, so compiling happens in one child process that lives as long as
the tests. Arguments are those of ``plan``; only the shape and dtype of tensors matter::

    inputs = [torch.zeros(2, 7, 8, dtype=torch.int32), …]
    for binary in compile_plan("lowering.gpu.memory_scan.serial.forward", inputs, SerialScan(), "sm_90"):
        assert binary.resources.spilled == 0, binary.name
        assert "bar.sync" not in binary.asm["ptx"]
"""

from __future__ import annotations

import importlib
import multiprocessing
import os
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor
from functools import cache
from typing import Any, NamedTuple

import torch

from lowering.gpu.plan import Plan
from lowering.gpu.triton_compiler import Binary
from lowering.targets import TARGETS, Gpu

# One architecture of each generation: for sm_86, sm_87 and sm_89, Triton compiles these kernels to the PTX of sm_80
# (``test_memory_step``).
ARCHITECTURES = ("sm_80", "sm_90", "sm_100", "gfx942")


class Spec(NamedTuple):
    """The shape and dtype of a tensor, sent to the other process."""

    shape: tuple[int, ...]
    dtype: torch.dtype


def compile_plan(module: str, arguments: Sequence[Any], schedule: Any, arch: str, plan: str = "plan") -> list[Binary]:
    """Compile all launches of ``module.plan(*arguments, schedule)``, in order, for an architecture such as "sm_80".

    Errors of the child process are raised in this one.
    """
    given = [Spec(tuple(x.shape), x.dtype) if isinstance(x, torch.Tensor) else x for x in arguments]
    return _child().submit(_compile, module, plan, given, schedule, arch).result()


def gpu(arch: str) -> Gpu:
    """Return a GPU with this architecture."""
    return next(target.gpu for target in TARGETS.values() if target.gpu is not None and target.gpu.arch == arch)


@cache
def _child() -> ProcessPoolExecutor:
    """Start the child process, which ends with this process."""
    return ProcessPoolExecutor(1, multiprocessing.get_context("spawn"), _compile_not_interpret)


def _compile_not_interpret() -> None:
    """Turn the interpreter off in the child process, before it imports Triton."""
    os.environ.pop("TRITON_INTERPRET", None)


def _compile(module: str, plan: str, arguments: list[Any], schedule: Any, arch: str) -> list[Binary]:
    on_meta = [torch.empty(x.shape, dtype=x.dtype, device="meta") if isinstance(x, Spec) else x for x in arguments]
    made: Plan = getattr(importlib.import_module(module), plan)(*on_meta, schedule)
    return [launch.binary(gpu(arch)) for launch in made.launches]  # type: ignore[attr-defined]
