"""The mass z of a scan, by which reads divide (paper, steps 5 and 6).

One program scans a head's span of tokens; lane k handles the k-th slot of a token. Lanes exchange the mass through
global memory, so there is a barrier between a store and the next load, and between a load and the next store.
``lowering.gpu.races`` checks them.
"""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from lowering.gpu.memory_scan.serial.mass_spans import first_masses
from lowering.gpu.plan import Launch
from lowering.gpu.resources import Work
from lowering.gpu.triton.arithmetic import decay
from lowering.gpu.triton.launch import TritonLaunch
from lowering.gpu.triton.types import in_triton
from ramnet.ops.accesses import Accesses

# Threads per program, one for each of a token's K slots; K is at most this.
LANES = 64


@triton.jit(do_not_specialize=["T", "SPAN"])
def walk_mass(
    write_slots, write_weights, read_slots, read_weights, mass, factors, T, SPAN, M: tl.constexpr, K: tl.constexpr,
    LANES: tl.constexpr, POWER: tl.constexpr, EPS: tl.constexpr, ACC: tl.constexpr,
):  # fmt: skip
    """Update mass [spans, N, M] in place from before to after each span of SPAN tokens, and compute factors [N, T, K],
    r / (z + ε) at each read."""
    head = tl.program_id(0).to(tl.int64)
    lane = tl.arange(0, LANES)
    inside = lane < K
    z = mass + (tl.program_id(1) * tl.num_programs(0) + head) * M
    start = tl.program_id(1) * SPAN
    stop = tl.minimum(start + SPAN, T)
    at = (head * T + start) * K + lane
    write_slot = tl.load(write_slots + at, mask=inside, other=0)
    next_write_slot = tl.load(write_slots + at + tl.minimum(stop - 1 - start, 1) * K, mask=inside, other=0)
    weight = tl.load(write_weights + at, mask=inside, other=0)
    read_slot = tl.load(read_slots + at, mask=inside, other=0)
    held = tl.load(z + write_slot, mask=inside, other=0)
    tl.debug_barrier()
    for t in range(start, stop):
        # Operands of the next tokens are prefetched while this token waits for the mass.
        one = tl.minimum(stop - 1 - t, 1)
        two = tl.minimum(stop - 1 - t, 2)
        far_write_slot = tl.load(write_slots + at + two * K, mask=inside, other=0)
        next_weight = tl.load(write_weights + at + one * K, mask=inside, other=0)
        next_read_slot = tl.load(read_slots + at + one * K, mask=inside, other=0)
        read_weight = tl.load(read_weights + at, mask=inside, other=0)
        w = weight.to(ACC)
        tl.store(z + write_slot, decay(w, POWER) * held + w, mask=inside)
        tl.debug_barrier()
        total = tl.load(z + read_slot, mask=inside, other=1)
        held = tl.load(z + next_write_slot, mask=inside, other=0)
        tl.debug_barrier()
        tl.store(factors + at, read_weight.to(ACC) * (1 / (total + EPS)), mask=inside)
        write_slot, next_write_slot, weight = next_write_slot, far_write_slot, next_weight
        read_slot = next_read_slot
        at += K


@triton.jit(do_not_specialize=["T", "SPAN"])
def sum_mass(
    write_slots, write_weights, gains, sums, T, SPAN, M: tl.constexpr, K: tl.constexpr, LANES: tl.constexpr,
    POWER: tl.constexpr, ACC: tl.constexpr,
):  # fmt: skip
    """Update gains and sums [spans, N, M] in place from those of an empty span to those of each span."""
    head = tl.program_id(0).to(tl.int64)
    lane = tl.arange(0, LANES)
    inside = lane < K
    first = (tl.program_id(1) * tl.num_programs(0) + head) * M
    start = tl.program_id(1) * SPAN
    stop = tl.minimum(start + SPAN, T)
    at = (head * T + start) * K + lane
    slot = tl.load(write_slots + at, mask=inside, other=0)
    weight = tl.load(write_weights + at, mask=inside, other=0)
    for t in range(start, stop):
        ahead = tl.minimum(stop - 1 - t, 1) * K
        next_slot = tl.load(write_slots + at + ahead, mask=inside, other=0)
        next_weight = tl.load(write_weights + at + ahead, mask=inside, other=0)
        w = weight.to(ACC)
        kept = decay(w, POWER)
        gain, total = gains + first + slot, sums + first + slot
        tl.store(gain, kept * tl.load(gain, mask=inside, other=0), mask=inside)
        tl.store(total, kept * tl.load(total, mask=inside, other=0) + w, mask=inside)
        tl.debug_barrier()
        slot, weight = next_slot, next_weight
        at += K


def forward(accesses: Accesses, mass: Tensor, decay_power: float, eps: float) -> tuple[list[Launch], Tensor]:
    """Return the launches, and the factors [N, T, K], r / (z + ε) of each read.

    ``mass`` [spans, N, M] has the dtype of sums. Before the launches, its first span must hold the mass before all
    tokens; after them, its last span holds the mass after all tokens.
    """
    write_slots, write_weights, read_slots, read_weights = accesses
    heads, tokens, top_k = write_slots.shape
    spans = mass.shape[0]
    factors = write_weights.new_empty(write_slots.shape, dtype=mass.dtype)
    sizes = {"T": tokens, "SPAN": triton.cdiv(tokens, spans), "M": mass.shape[2], "K": top_k, "LANES": LANES,
             "POWER": decay_power, "ACC": in_triton(mass.dtype)}  # fmt: skip
    writes = {"write_slots": write_slots, "write_weights": write_weights}
    arguments = {
        **writes, "read_slots": read_slots, "read_weights": read_weights, "mass": mass, "factors": factors,
        "EPS": eps, **sizes,
    }  # fmt: skip
    count, size = write_slots.numel(), mass.element_size()
    operands = count * (write_slots.element_size() + write_weights.element_size())
    results = count * size
    walk = Work(
        programs=heads * spans, threads=LANES, dram_bytes=2 * operands + results + 2 * mass.nbytes,
        cache_bytes=2 * operands + results + 3 * count * size,
        steps=triton.cdiv(tokens, spans), barriers=2,
    )  # fmt: skip
    pairs = Work(
        programs=heads * spans, threads=LANES, dram_bytes=operands + 4 * mass.nbytes,
        cache_bytes=operands + 4 * count * size, steps=triton.cdiv(tokens, spans), barriers=1,
    )  # fmt: skip
    launches = [
        *first_masses(sum_mass, {**writes, **sizes}, mass, LANES, pairs),
        TritonLaunch(walk_mass, (heads, spans), arguments, LANES, walk),
    ]
    return launches, factors
