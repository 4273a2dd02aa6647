"""The plan of decode_heads by TIR.

Two threads of a program decode the query and the key; then masses and rows are updated as in memory_step.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from lowering.gpu.address_decode.work import decode_iterations
from lowering.gpu.decode_heads.work import operand_bytes
from lowering.gpu.memory_step.work import state_bytes
from lowering.gpu.plan import Plan
from lowering.gpu.resources import Work
from lowering.gpu.tir import Kernels, TirLaunch, refuse_two_types
from schedules.gpu.step import DecodeHeads

_WARP = 32


def plan(
    projected: Tensor, log_scale: Tensor, position: Tensor, memory: Tensor, mass: Tensor, order: int, sub_dim: int,
    top_k: int, cape_heads: int, temperature: float, decay_power: float, eps: float, schedule: DecodeHeads,
) -> Plan:  # fmt: skip
    """Plan decode_heads by TIR; see ``lowering.gpu.decode_heads.triton.plan``.

    Raises ValueError if memory and mass differ in dtype.
    """
    refuse_two_types(memory, mass)
    batch, heads, slots, width = memory.shape
    dtype = torch.float64 if memory.dtype == torch.float64 else projected.dtype
    output = projected.new_empty((batch, heads, width), dtype=dtype)
    constants = {"decay_power": decay_power, "eps": eps, "cape_heads": cape_heads, "temperature": temperature}
    sizes = (batch * heads, order, sub_dim, top_k, slots, width)
    kernels = Kernels(_template, "decode_heads", sizes, dtype, memory.dtype, schedule, constants)
    tensors = (projected.to(dtype), log_scale.to(dtype), position.to(torch.int64), memory, mass, output)
    programs = batch * heads
    moved = operand_bytes(programs, order, sub_dim, width, dtype.itemsize)
    moved += state_bytes(programs, top_k, width, memory.element_size())
    work = Work(
        programs=programs, threads=schedule.threads, dram_bytes=moved, cache_bytes=moved,
        trips=5, shared_trips=2 + order, barriers=5, iterations=decode_iterations(order, sub_dim, top_k),
        # Two threads decode, which takes most of the instructions. Their warp issues them for all its lanes.
        busy_threads=_WARP,
    )  # fmt: skip
    launch = TirLaunch(kernels, "decode_heads", (batch, heads), tensors, schedule.threads, work)
    return Plan((launch,), (output.view(batch, heads * width),))


def _template(*how: Any) -> Any:
    from lowering.gpu.decode_heads.template import module

    return module(*how)
