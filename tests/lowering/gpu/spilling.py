"""Kernels that are only compiled: one that fits in registers, one that does not."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from lowering.gpu.plan import Plan
from lowering.gpu.resources import Work
from lowering.gpu.triton.launch import TritonLaunch


@triton.jit(do_not_specialize=["n"])
def add(x, y, n, W: tl.constexpr):
    i = tl.program_id(0) * W + tl.arange(0, W)
    tl.store(y + i, tl.load(x + i, mask=i < n) + 1, mask=i < n)


@triton.jit(do_not_specialize=["n"])
def hold(x, y, n, W: tl.constexpr, ROWS: tl.constexpr):
    """Each thread holds ROWS · W / threads values during a loop."""
    i = tl.arange(0, W)
    rows = ()
    for r in tl.static_range(ROWS):
        rows += (tl.load(x + r * W + i),)
    for _ in range(n):
        for r in tl.static_range(ROWS):
            rows = rows[:r] + (rows[r] * rows[(r + 1) % ROWS],) + rows[r + 1 :]  # noqa: RUF005 Triton unpacks none
    for r in tl.static_range(ROWS):
        tl.store(y + r * W + i, rows[r])


WORK = Work(programs=1, threads=64, dram_bytes=1.0, cache_bytes=1.0)


def plan(x: Tensor, threads: int) -> Plan:
    y = torch.empty_like(x)
    return Plan((TritonLaunch(add, (1,), {"x": x, "y": y, "n": 8, "W": 64}, threads, WORK),), (y,))


def plan_large(x: Tensor, threads: int) -> Plan:
    """272 values per thread, which has 255 registers on NVIDIA GPUs and 512 on AMD GPUs."""
    y = torch.empty_like(x)
    return Plan((TritonLaunch(hold, (1,), {"x": x, "y": y, "n": 8, "W": 1024, "ROWS": 17}, threads, WORK),), (y,))
