"""Kernels that are only compiled, and whose instructions can be counted by hand."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from lowering.gpu.plan import Plan
from lowering.gpu.resources import Work
from lowering.gpu.triton.launch import TritonLaunch


@triton.jit(do_not_specialize=["n"])
def in_a_loop(x, y, n, TERMS: tl.constexpr, W: tl.constexpr):
    """Each thread does n · TERMS multiply-adds of values that it loads."""
    i = tl.arange(0, W)
    total = tl.load(x + i)
    for t in range(n):
        for term in tl.static_range(TERMS):
            total = total * tl.load(x + (t * TERMS + term) * W + i) + 1.5
    tl.store(y + i, total)


@triton.jit
def straight(x, y, TERMS: tl.constexpr, W: tl.constexpr):
    """Each thread does TERMS multiply-adds in straight code."""
    i = tl.arange(0, W)
    total = tl.load(x + i)
    for term in tl.static_range(TERMS):
        total = total * tl.load(x + term * W + i) + 1.5
    tl.store(y + i, total)


WORK = Work(programs=1, threads=64, dram_bytes=1.0, cache_bytes=1.0)


def plan(x: Tensor, terms: int) -> Plan:
    y = torch.empty_like(x)
    arguments = {"x": x, "y": y, "n": 8, "TERMS": terms, "W": 64}
    return Plan((TritonLaunch(in_a_loop, (1,), arguments, 64, WORK),), (y,))


def plan_straight(x: Tensor, terms: int) -> Plan:
    y = torch.empty_like(x)
    return Plan((TritonLaunch(straight, (1,), {"x": x, "y": y, "TERMS": terms, "W": 64}, 64, WORK),), (y,))
