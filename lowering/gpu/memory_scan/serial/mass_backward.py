"""Gradients of the weights and the mass, from dot products over the channels.

As in ``mass``, one program scans a head's span of tokens, in reverse; lane k handles the k-th slot of a token. Lanes
exchange the mass's gradient through global memory, with barriers.
"""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from lowering.gpu.memory_scan.serial.mass import LANES, Factors
from lowering.gpu.memory_scan.serial.mass_spans import first_masses
from lowering.gpu.plan import Launch
from lowering.gpu.resources import Work
from lowering.gpu.triton.arithmetic import decay, decay_slope
from lowering.gpu.triton.launch import TritonLaunch
from lowering.gpu.triton.types import in_triton
from ramnet.ops.accesses import Accesses


@triton.jit(do_not_specialize=["T", "SPAN"])
def walk_mass_backward(
    along_reads, along_writes, write_slots, write_weights, read_slots, factors, inverses, replaced, grad_mass,
    grad_write_weights, grad_read_weights, T, SPAN, M: tl.constexpr, K: tl.constexpr, TILES: tl.constexpr,
    LANES: tl.constexpr, POWER: tl.constexpr, PROXY_EPS: tl.constexpr, ACC: tl.constexpr,
):  # fmt: skip
    """Update grad_mass [spans, N, M] in place from the gradient of the mass after each span to that before it, and
    compute the gradients of the weights [N, T, K].

    Args:
        along_reads, along_writes: [N, TILES, T, K], results of ``scan_rows_backward``.
        factors, inverses, replaced: [N, T, K], results of ``walk_mass``.
    """
    head = tl.program_id(0).to(tl.int64)
    lane = tl.arange(0, LANES)
    inside = lane < K
    grads = grad_mass + (tl.program_id(1) * tl.num_programs(0) + head) * M
    start = tl.program_id(1) * SPAN
    stop = tl.minimum(start + SPAN, T)
    at = (head * T + stop - 1) * K + lane
    along_at = (head * TILES * T + stop - 1) * K + lane
    write_slot = tl.load(write_slots + at, mask=inside, other=0)
    read_slot = tl.load(read_slots + at, mask=inside, other=0)
    along = _add_tiles(along_reads + along_at, T, inside, K, TILES)
    inverse = tl.load(inverses + at, mask=inside, other=0)
    factor = tl.load(factors + at, mask=inside, other=0)
    for i in range(stop - start):
        one = tl.minimum(stop - start - 1 - i, 1) * K
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
    """Sum the dot products of all tiles of channels in a fixed order."""
    total = tl.load(pointers, mask=inside, other=0)
    for i in tl.static_range(1, TILES):
        total += tl.load(pointers + i * T.to(tl.int64) * K, mask=inside, other=0)
    return total


@triton.jit(do_not_specialize=["T", "SPAN"])
def sum_mass_backward(
    along_reads, write_slots, write_weights, read_slots, factors, inverses, gains, sums, T, SPAN, M: tl.constexpr,
    K: tl.constexpr, TILES: tl.constexpr, LANES: tl.constexpr, POWER: tl.constexpr, ACC: tl.constexpr,
):  # fmt: skip
    """Update gains and sums [spans, N, M] of the reverse pass in place from those of an empty span to those of each."""
    head = tl.program_id(0).to(tl.int64)
    lane = tl.arange(0, LANES)
    inside = lane < K
    first = (tl.program_id(1) * tl.num_programs(0) + head) * M
    start = tl.program_id(1) * SPAN
    stop = tl.minimum(start + SPAN, T)
    at = (head * T + stop - 1) * K + lane
    along_at = (head * TILES * T + stop - 1) * K + lane
    write_slot = tl.load(write_slots + at, mask=inside, other=0)
    read_slot = tl.load(read_slots + at, mask=inside, other=0)
    along = _add_tiles(along_reads + along_at, T, inside, K, TILES)
    for i in range(stop - start):
        one = tl.minimum(stop - start - 1 - i, 1) * K
        next_write_slot = tl.load(write_slots + at - one, mask=inside, other=0)
        next_read_slot = tl.load(read_slots + at - one, mask=inside, other=0)
        next_along = _add_tiles(along_reads + along_at - one, T, inside, K, TILES)
        inverse = tl.load(inverses + at, mask=inside, other=0)
        factor = tl.load(factors + at, mask=inside, other=0)
        kept = decay(tl.load(write_weights + at, mask=inside, other=0).to(ACC), POWER)
        read = sums + first + read_slot
        tl.store(read, tl.load(read, mask=inside, other=0) - along * factor * inverse, mask=inside)
        tl.debug_barrier()
        gain, total = gains + first + write_slot, sums + first + write_slot
        tl.store(gain, kept * tl.load(gain, mask=inside, other=0), mask=inside)
        tl.store(total, kept * tl.load(total, mask=inside, other=0), mask=inside)
        tl.debug_barrier()
        write_slot, read_slot, along = next_write_slot, next_read_slot, next_along
        at -= K
        along_at -= K


def backward(
    along_reads: Tensor, along_writes: Tensor, accesses: Accesses, factors: Factors, grad_mass: Tensor,
    grad_write_weights: Tensor, grad_read_weights: Tensor, decay_power: float, proxy_eps: float,
) -> list[Launch]:  # fmt: skip
    """Return the launches that compute the gradients of the weights [N, T, K].

    ``grad_mass`` [spans, N, M] has the dtype of sums. Before the launches, its last span must hold the gradient of the
    mass after all tokens; after them, its first span holds that of the mass before all tokens.
    """
    heads, tiles, tokens, top_k = along_reads.shape
    spans = grad_mass.shape[0]
    sizes = {"T": tokens, "SPAN": triton.cdiv(tokens, spans), "M": grad_mass.shape[2], "K": top_k, "TILES": tiles,
             "LANES": LANES, "POWER": decay_power, "ACC": in_triton(grad_mass.dtype)}  # fmt: skip
    both = {
        "along_reads": along_reads, "write_slots": accesses.write_slots, "write_weights": accesses.write_weights,
        "read_slots": accesses.read_slots, "factors": factors.reads, "inverses": factors.inverses,
    }  # fmt: skip
    others = {"along_writes": along_writes, "replaced": factors.replaced, "grad_write_weights": grad_write_weights,
              "grad_read_weights": grad_read_weights}  # fmt: skip
    count, size = accesses.write_slots.numel(), grad_mass.element_size()
    shared_operands = sum(x.nbytes for x in both.values())
    moved = shared_operands + sum(x.nbytes for x in others.values())
    steps = triton.cdiv(tokens, spans)
    walk = Work(
        programs=heads * spans, threads=LANES, dram_bytes=moved + 2 * grad_mass.nbytes,
        cache_bytes=moved + 4 * count * size, steps=steps, trips=2, barriers=2,
    )  # fmt: skip
    arguments = {**both, **others, "grad_mass": grad_mass, "PROXY_EPS": proxy_eps, **sizes}
    pairs = Work(
        programs=heads * spans, threads=LANES, dram_bytes=shared_operands + 4 * grad_mass.nbytes,
        cache_bytes=shared_operands + 6 * count * size, steps=steps, trips=2, barriers=2,
    )  # fmt: skip
    return [
        *first_masses(sum_mass_backward, {**both, **sizes}, grad_mass, LANES, pairs, reverse=True),
        TritonLaunch(walk_mass_backward, (heads, spans), arguments, LANES, walk),
    ]
