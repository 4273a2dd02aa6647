"""The mass of a scan's backward: from dot products over the channels to the gradients of the weights and the mass.

As in ``memory_scan_mass`` one program walks a head, lane k on the k-th slot of a token, and lanes exchange the mass's
gradient through global memory, across barriers.
"""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from lowering.triton.arithmetic import decay, decay_slope
from lowering.triton.launch import Launch
from lowering.triton.memory_scan_mass import LANES
from lowering.triton.types import in_triton
from lowering.work import Work


@triton.jit(do_not_specialize=["T"])
def walk_mass_backward(
    along_reads, along_writes, write_slots, write_weights, read_slots, factors, inverses, replaced, grad_mass,
    grad_write_weights, grad_read_weights, T, M: tl.constexpr, K: tl.constexpr, TILES: tl.constexpr,
    LANES: tl.constexpr, POWER: tl.constexpr, PROXY_EPS: tl.constexpr, ACC: tl.constexpr,
):  # fmt: skip
    """grad_mass [N, M], from the gradient of the mass after all tokens to that before, in place, and those of the
    weights [N, T, K].

    Args:
        along_reads, along_writes: [N, TILES, T, K], as ``scan_rows_backward`` leaves them.
        factors, inverses, replaced: [N, T, K], as ``walk_mass`` leaves them.
    """
    head = tl.program_id(0).to(tl.int64)
    lane = tl.arange(0, LANES)
    inside = lane < K
    grads = grad_mass + head * M
    at = (head * T + T - 1) * K + lane
    along_at = (head * TILES * T + T - 1) * K + lane
    write_slot = tl.load(write_slots + at, mask=inside, other=0)
    read_slot = tl.load(read_slots + at, mask=inside, other=0)
    along = _add_tiles(along_reads + along_at, T, inside, K, TILES)
    inverse = tl.load(inverses + at, mask=inside, other=0)
    factor = tl.load(factors + at, mask=inside, other=0)
    for i in range(T):
        one = tl.minimum(T - 1 - i, 1) * K
        next_write_slot = tl.load(write_slots + at - one, mask=inside, other=0)
        next_read_slot = tl.load(read_slots + at - one, mask=inside, other=0)
        next_along = _add_tiles(along_reads + along_at - one, T, inside, K, TILES)
        next_inverse = tl.load(inverses + at - one, mask=inside, other=0)
        next_factor = tl.load(factors + at - one, mask=inside, other=0)
        weight = tl.load(write_weights + at, mask=inside, other=0).to(ACC)
        before = tl.load(replaced + at, mask=inside, other=0)
        along_write = _add_tiles(along_writes + along_at, T, inside, K, TILES)
        tl.store(grad_read_weights + at, along * inverse, mask=inside)

        read = grads + read_slot
        tl.store(read, tl.load(read, mask=inside, other=0) - along * factor * inverse, mask=inside)
        tl.debug_barrier()
        written = grads + write_slot
        grad = tl.load(written, mask=inside, other=0)
        tl.store(written, decay(weight, POWER) * grad, mask=inside)
        tl.debug_barrier()
        through_mass = grad * (1 + decay_slope(weight, POWER, PROXY_EPS) * before)
        tl.store(grad_write_weights + at, along_write + through_mass, mask=inside)
        write_slot, read_slot, along = next_write_slot, next_read_slot, next_along
        inverse, factor = next_inverse, next_factor
        at -= K
        along_at -= K


@triton.jit
def _add_tiles(pointers, T, inside, K: tl.constexpr, TILES: tl.constexpr):
    """The dot products of all tiles of channels, always in the same order."""
    total = tl.load(pointers, mask=inside, other=0)
    for i in tl.static_range(1, TILES):
        total += tl.load(pointers + i * T.to(tl.int64) * K, mask=inside, other=0)
    return total


def backward(
    along_reads: Tensor, along_writes: Tensor, write_slots: Tensor, write_weights: Tensor, read_slots: Tensor,
    factors: Tensor, inverses: Tensor, replaced: Tensor, grad_mass: Tensor, grad_write_weights: Tensor,
    grad_read_weights: Tensor, decay_power: float, proxy_eps: float,
) -> Launch:  # fmt: skip
    """``grad_mass`` [N, M], of the type of sums, is walked in place; the gradients [N, T, K] are filled."""
    heads, tiles, tokens, top_k = along_reads.shape
    arguments = {
        "along_reads": along_reads, "along_writes": along_writes, "write_slots": write_slots,
        "write_weights": write_weights, "read_slots": read_slots, "factors": factors, "inverses": inverses,
        "replaced": replaced, "grad_mass": grad_mass, "grad_write_weights": grad_write_weights,
        "grad_read_weights": grad_read_weights, "T": tokens, "M": grad_mass.shape[1], "K": top_k, "TILES": tiles,
        "LANES": LANES, "POWER": decay_power, "PROXY_EPS": proxy_eps, "ACC": in_triton(factors.dtype),
    }  # fmt: skip
    moved = sum(x.nbytes for x in arguments.values() if isinstance(x, Tensor) and x is not grad_mass)
    accesses = write_slots.numel()
    work = Work(
        programs=heads, threads=LANES, dram_bytes=moved + 2 * grad_mass.nbytes,
        cache_bytes=moved + 4 * accesses * grad_mass.element_size(), operations=(16 + 2 * tiles) * accesses,
        steps=tokens, trips=2, barriers=2,
    )  # fmt: skip
    return Launch(walk_mass_backward, (heads,), arguments, LANES, work)
