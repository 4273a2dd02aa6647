"""Kernels with data races, for the tests of ``lowering.gpu.races``; plans run in the process that compiles."""

from __future__ import annotations

import importlib.util
import tempfile
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
import triton
import triton.language as tl

from lowering.gpu.memory_scan.serial import mass as memory_scan_mass
from lowering.gpu.plan import Plan
from lowering.gpu.resources import Work
from lowering.gpu.triton.launch import TritonLaunch
from ramnet.ops.accesses import Accesses

BARRIER = "tl.debug_barrier()"
# Triton reads a kernel's source when it compiles, so the files must exist until the process ends.
VARIANTS = tempfile.TemporaryDirectory()


@triton.jit
def rotate(buffer, ROUNDS, SIZE: tl.constexpr, BARRIER: tl.constexpr):
    """Every thread reads its neighbour's value. BARRIER is "none", "branch" (which may not be taken) or "loop"."""
    lane = tl.arange(0, SIZE)
    for i in range(ROUNDS):
        number = tl.load(buffer + (lane + 1) % SIZE)
        if BARRIER == "loop":
            tl.debug_barrier()
        if (BARRIER == "branch") & (i > 3):
            tl.debug_barrier()
        tl.store(buffer + lane, number)
        tl.debug_barrier()


def plan_rotate(barrier: str, _schedule: None) -> Plan:
    arguments = {"buffer": torch.empty(128, device="meta"), "ROUNDS": 7, "SIZE": 128, "BARRIER": barrier}
    return Plan((TritonLaunch(rotate, (1,), arguments, 128, Work(1, 128, 0, 0, 0)),), ())


def plan_mass_without(number: int, *arguments: Any) -> Plan:
    """The scan of the mass without its barrier of that index; -1 removes none."""
    return Plan(tuple(_without(memory_scan_mass, number).forward(Accesses(*arguments[:4]), *arguments[4:-1])[0]), ())


def _without(module: ModuleType, number: int) -> Any:
    """Import ``module`` from its source without the barrier of that index."""
    source = Path(str(module.__file__)).read_text(encoding="utf-8")
    parts = source.split(BARRIER)
    joined = parts[0]
    for i, part in enumerate(parts[1:]):
        joined += ("pass" if i == number else BARRIER) + part
    path = Path(VARIANTS.name) / f"{module.__name__}.{number}.py"
    path.write_text(joined, encoding="utf-8")
    spec = importlib.util.spec_from_file_location("variant", path)
    assert spec is not None and spec.loader is not None
    variant = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(variant)
    return variant


def mass_arguments() -> list[Any]:
    """Return the arguments of ``mass.forward``, with the tensors of its accesses listed separately."""
    slots = torch.zeros(1, 7, 8, dtype=torch.int32)
    weights = torch.zeros(1, 7, 8)
    return [slots, weights, slots, weights, torch.zeros(2, 1, 16), 1.0, 1e-6]
