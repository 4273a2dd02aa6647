"""The plan of memory_step by TIR: one program per head, which waits for slots, then masses, then rows."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from lowering.gpu.memory_step.work import operand_bytes, state_bytes
from lowering.gpu.plan import Plan
from lowering.gpu.resources import Work
from lowering.gpu.tir import Kernels, TirLaunch, refuse_two_types
from schedules.gpu.step import MemoryStep


def plan(
    write_slots: Tensor, write_weights: Tensor, read_slots: Tensor, read_weights: Tensor, values: Tensor,
    memory: Tensor, mass: Tensor, decay_power: float, eps: float, schedule: MemoryStep,
) -> Plan:  # fmt: skip
    """Plan memory_step by TIR; see ``lowering.gpu.memory_step.triton.plan``.

    Raises ValueError if memory and mass differ in dtype.
    """
    refuse_two_types(memory, mass)
    heads, top_k = write_slots.shape
    width = memory.shape[2]
    dtype = torch.float64 if memory.dtype == torch.float64 else values.dtype
    output = torch.empty_like(values, dtype=dtype)
    constants = {"decay_power": decay_power, "eps": eps}
    sizes = (heads, top_k, *memory.shape[1:])
    kernels = Kernels(_template, "memory_step", sizes, dtype, memory.dtype, schedule, constants)
    tensors = (write_slots, write_weights.to(dtype), read_slots, read_weights.to(dtype), values.to(dtype),
               memory, mass, output)  # fmt: skip
    moved = operand_bytes(heads, top_k, width, dtype.itemsize)
    moved += state_bytes(heads, top_k, width, memory.element_size())
    work = Work(
        programs=heads, threads=schedule.threads, dram_bytes=moved, cache_bytes=moved,
        trips=5, shared_trips=2, barriers=2, iterations=(-(-width // schedule.threads),),
    )  # fmt: skip
    return Plan((TirLaunch(kernels, "memory_step", (heads,), tensors, schedule.threads, work),), (output,))


def _template(*how: Any) -> Any:
    from lowering.gpu.memory_step.template import module

    return module(*how)
