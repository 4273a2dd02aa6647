"""The mass of a long sequence, computed as a parallel scan over spans of tokens.

Over a span, every slot's mass changes from z to gain · z + sum. These pairs are computed for all spans in parallel.
Then a sequential pass over the spans gives the first mass of each, from which all spans are scanned in parallel.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from lowering.gpu.plan import Launch
from lowering.gpu.resources import Work
from lowering.gpu.triton.launch import TritonLaunch

# Each thread works on one element.
BLOCK = THREADS = 128


@triton.jit(do_not_specialize=["SIZE"])
def open_spans(gains, sums, SIZE, BLOCK: tl.constexpr):
    """Initialise gains to 1 and sums to 0, the pair of an empty span."""
    at = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    tl.store(gains + at, tl.full((BLOCK,), 1, gains.dtype.element_ty), mask=at < SIZE)
    tl.store(sums + at, tl.full((BLOCK,), 0, sums.dtype.element_ty), mask=at < SIZE)


@triton.jit(do_not_specialize=["SIZE", "SPANS"])
def join_spans(mass, gains, sums, SIZE, SPANS, BLOCK: tl.constexpr):
    """Compute the mass [SPANS, SIZE] at the start of each span from that of the first span.

    No element is both stored and loaded, so no barrier is needed.
    """
    at = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    inside = at < SIZE
    z = tl.load(mass + at, mask=inside)
    for _ in range(SPANS - 1):
        z = tl.load(gains + at, mask=inside) * z + tl.load(sums + at, mask=inside)
        at += SIZE
        tl.store(mass + at, z, mask=inside)


def first_masses(kernel: Any, arguments: Mapping[str, Any], mass: Tensor, threads: int, work: Work) -> list[Launch]:
    """Return the launches that compute the first mass of each span, mass [S, N, M]; none if there is one span.

    ``kernel`` computes the pairs of all spans; it takes "gains" and "sums" besides its ``arguments``.
    """
    if mass.shape[0] == 1:
        return []
    gains, sums = torch.empty_like(mass), torch.empty_like(mass)
    pairs = TritonLaunch(
        kernel, (mass.shape[1], mass.shape[0]), {**arguments, "gains": gains, "sums": sums}, threads, work
    )
    return [opened(gains, sums), pairs, joined(mass, gains, sums)]


def number(tokens: int, wanted: int) -> int:
    """Return the number of spans of equal length, the last of which may be shorter: at most ``wanted``, none empty."""
    return triton.cdiv(tokens, triton.cdiv(tokens, min(wanted, tokens)))


def opened(gains: Tensor, sums: Tensor) -> Launch:
    """Return the launch of ``open_spans`` on [S, N, M]."""
    programs = triton.cdiv(gains.numel(), BLOCK)
    arguments = {"gains": gains, "sums": sums, "SIZE": gains.numel(), "BLOCK": BLOCK}
    moved = gains.nbytes + sums.nbytes
    work = Work(programs, THREADS, dram_bytes=moved, cache_bytes=moved)
    return TritonLaunch(open_spans, (programs,), arguments, THREADS, work)


def joined(mass: Tensor, gains: Tensor, sums: Tensor) -> Launch:
    """Return the launch of ``join_spans``, which fills mass [S, N, M] except its first span."""
    spans = mass.shape[0]
    size = mass[0].numel()
    programs = triton.cdiv(size, BLOCK)
    arguments = {"mass": mass, "gains": gains, "sums": sums, "SIZE": size, "SPANS": spans, "BLOCK": BLOCK}
    moved = 3 * mass.nbytes
    work = Work(programs, THREADS, dram_bytes=moved, cache_bytes=moved, steps=spans)
    return TritonLaunch(join_spans, (programs,), arguments, THREADS, work)
