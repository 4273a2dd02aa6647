"""The mass z of a scan, walked forward in time: what each read divides by.

One program walks a head, lane k on the k-th slot of a token. Lanes exchange the mass through global memory, so that a
barrier stands between a store and the next load, and between a load and the next store. ``ordering`` checks it.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from lowering.triton.arithmetic import decay
from lowering.triton.launch import Launch
from lowering.triton.types import in_triton
from lowering.work import Work

# A thread for each of the K slots of a token, and a whole number of warps; K is at most this.
LANES = 64


@triton.jit(do_not_specialize=["T"])
def walk_mass(
    write_slots, write_weights, read_slots, read_weights, mass, factors, inverses, replaced, T, M: tl.constexpr,
    K: tl.constexpr, LANES: tl.constexpr, POWER: tl.constexpr, EPS: tl.constexpr, KEEP: tl.constexpr,
    ACC: tl.constexpr,
):  # fmt: skip
    """mass [N, M] after all tokens, in place; factors [N, T, K]: r / (z + ε) at each read.

    KEEP: also inverses [N, T, K], 1 / (z + ε), and replaced [N, T, K], z before each write.
    """
    head = tl.program_id(0).to(tl.int64)
    lane = tl.arange(0, LANES)
    inside = lane < K
    z = mass + head * M
    at = head * T * K + lane
    write_slot = tl.load(write_slots + at, mask=inside, other=0)
    next_write_slot = tl.load(write_slots + at + tl.minimum(T - 1, 1) * K, mask=inside, other=0)
    weight = tl.load(write_weights + at, mask=inside, other=0)
    read_slot = tl.load(read_slots + at, mask=inside, other=0)
    held = tl.load(z + write_slot, mask=inside, other=0)
    tl.debug_barrier()
    for t in range(T):
        # Operands of the tokens to come are on their way while this one waits for the mass.
        one = tl.minimum(T - 1 - t, 1)
        two = tl.minimum(T - 1 - t, 2)
        far_write_slot = tl.load(write_slots + at + two * K, mask=inside, other=0)
        next_weight = tl.load(write_weights + at + one * K, mask=inside, other=0)
        next_read_slot = tl.load(read_slots + at + one * K, mask=inside, other=0)
        read_weight = tl.load(read_weights + at, mask=inside, other=0)
        if KEEP:
            tl.store(replaced + at, held, mask=inside)
        w = weight.to(ACC)
        tl.store(z + write_slot, decay(w, POWER) * held + w, mask=inside)
        tl.debug_barrier()
        total = tl.load(z + read_slot, mask=inside, other=1)
        held = tl.load(z + next_write_slot, mask=inside, other=0)
        tl.debug_barrier()
        inverse = 1 / (total + EPS)
        if KEEP:
            tl.store(inverses + at, inverse, mask=inside)
        tl.store(factors + at, read_weight.to(ACC) * inverse, mask=inside)
        write_slot, next_write_slot, weight = next_write_slot, far_write_slot, next_weight
        read_slot = next_read_slot
        at += K


def forward(
    write_slots: Tensor, write_weights: Tensor, read_slots: Tensor, read_weights: Tensor, mass: Tensor,
    decay_power: float, eps: float, acc: torch.dtype, keep: bool,
) -> tuple[Launch, Tensor, Tensor, Tensor]:  # fmt: skip
    """The launch, and its factors, inverses and replaced masses [N, T, K] of type ``acc``, the last two if ``keep``.

    ``mass`` [N, M] of type ``acc`` is walked in place.
    """
    heads, tokens, top_k = write_slots.shape
    factors = write_weights.new_empty(write_slots.shape, dtype=acc)
    inverses, replaced = (torch.empty_like(factors) if keep else factors for _ in range(2))
    arguments = {
        "write_slots": write_slots, "write_weights": write_weights, "read_slots": read_slots,
        "read_weights": read_weights, "mass": mass, "factors": factors, "inverses": inverses, "replaced": replaced,
        "T": tokens, "M": mass.shape[1], "K": top_k, "LANES": LANES, "POWER": decay_power, "EPS": eps,
        "KEEP": keep, "ACC": in_triton(acc),
    }  # fmt: skip
    accesses = write_slots.numel()
    operands = 2 * accesses * (write_slots.element_size() + write_weights.element_size())
    results = (3 if keep else 1) * accesses * acc.itemsize
    work = Work(
        programs=heads, threads=LANES, dram_bytes=operands + results + 2 * mass.numel() * acc.itemsize,
        cache_bytes=operands + results + 3 * accesses * acc.itemsize, operations=12 * accesses, steps=tokens,
        trips=1, barriers=2,
    )  # fmt: skip
    return Launch(walk_mass, (heads,), arguments, LANES, work), factors, inverses, replaced
