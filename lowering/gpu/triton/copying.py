"""A launch that copies a tensor, with conversion of its dtype."""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from lowering.gpu.plan import Launch
from lowering.gpu.resources import Work
from lowering.gpu.triton.launch import TritonLaunch

BLOCK = 2048
THREADS = 256


@triton.jit(do_not_specialize=["BLOCKS", "REST"])
def copy_elements(source, target, BLOCKS, REST, BLOCK: tl.constexpr):
    """Copy BLOCKS whole blocks and REST more elements; the total may exceed 2^31, which int32 arguments cannot."""
    block = tl.program_id(0)
    lane = tl.arange(0, BLOCK)
    at = block.to(tl.int64) * BLOCK + lane
    inside = (block < BLOCKS) | (lane < REST)
    tl.store(target + at, tl.load(source + at, mask=inside), mask=inside)


def copy(source: Tensor, target: Tensor) -> Launch:
    """Return the launch that copies ``source`` to ``target``; both are contiguous and of the same shape."""
    blocks, rest = divmod(source.numel(), BLOCK)
    programs = blocks + (rest > 0)
    moved = source.numel() * (source.element_size() + target.element_size())
    arguments = {"source": source, "target": target, "BLOCKS": blocks, "REST": rest, "BLOCK": BLOCK}
    work = Work(programs, THREADS, dram_bytes=moved, cache_bytes=moved)
    return TritonLaunch(copy_elements, (programs,), arguments, THREADS, work)
