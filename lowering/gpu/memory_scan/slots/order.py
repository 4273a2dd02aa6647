"""Sorts the accesses of each head, writes and reads together, by slot and within a slot by time.

Accesses are numbered in time order as events: token t's K writes are t·2K … t·2K + K−1, and its K reads the K numbers
after them. The sort is a stable radix sort by a few bits of the slot number per pass, so its scratch does not grow with
M. It is integer arithmetic only, and programs of a launch do not communicate.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

from lowering.gpu.plan import Launch
from lowering.gpu.resources import Work
from lowering.gpu.triton.launch import TritonLaunch

# Accesses that a program ranks, and the most bits of the slot number that one radix pass sorts by. A program compares
# every access with every digit value in registers.
CHUNK = 128
DIGIT_BITS = 5
THREADS = 128
_BLOCK = 1024  # entries of the count table that one program sums


@triton.jit
def _load(slots, events, access, base, accesses, K: tl.constexpr, FIRST: tl.constexpr):
    """Load slot and event of an access. In the FIRST pass, ``slots`` are write slots and ``events`` read slots."""
    inside = access < accesses
    if FIRST:
        token, lane = access // (2 * K), access % (2 * K)
        at = base // 2 + token * K + lane % K
        written = tl.load(slots + at, mask=inside & (lane < K), other=0)
        read = tl.load(events + at, mask=inside & (lane >= K), other=0)
        return written + read, access
    else:
        return (
            tl.load(slots + base + access, mask=inside, other=0),
            tl.load(events + base + access, mask=inside, other=0),
        )


@triton.jit(do_not_specialize=["accesses", "chunks"])
def order_count(
    slots, events, counts, accesses, chunks,
    K: tl.constexpr, FIRST: tl.constexpr, SHIFT: tl.constexpr, BINS: tl.constexpr, CHUNK: tl.constexpr,
):  # fmt: skip
    """Compute counts [N, BINS, chunks], the number of accesses of each chunk that have each digit."""
    head, chunk = tl.program_id(0) // chunks, tl.program_id(0) % chunks
    access = chunk * CHUNK + tl.arange(0, CHUNK)
    slot, _ = _load(slots, events, access, head.to(tl.int64) * accesses, accesses, K, FIRST)
    digit = tl.where(access < accesses, (slot >> SHIFT) & (BINS - 1), BINS)
    bins = tl.arange(0, BINS)
    hits = (digit[:, None] == bins[None, :]).to(tl.int32)
    tl.store(counts + (head.to(tl.int64) * BINS + bins) * chunks + chunk, tl.sum(hits, 0))


@triton.jit(do_not_specialize=["entries"])
def order_offsets(counts, offsets, entries, BLOCK: tl.constexpr):
    """Compute offsets, the exclusive prefix sums of counts within a head; both [N, entries]."""
    base = tl.program_id(0).to(tl.int64) * entries
    before = 0
    for start in range(0, entries, BLOCK):
        entry = start + tl.arange(0, BLOCK)
        count = tl.load(counts + base + entry, mask=entry < entries, other=0)
        tl.store(offsets + base + entry, before + tl.cumsum(count, 0) - count, mask=entry < entries)
        before += tl.sum(count, 0)


@triton.jit(do_not_specialize=["accesses", "chunks"])
def order_place(
    slots, events, offsets, placed_slots, placed_events, accesses, chunks,
    K: tl.constexpr, FIRST: tl.constexpr, SHIFT: tl.constexpr, BINS: tl.constexpr, CHUNK: tl.constexpr,
):  # fmt: skip
    """Move each access behind all accesses with a smaller digit, and those with the same digit that precede it."""
    head, chunk = tl.program_id(0) // chunks, tl.program_id(0) % chunks
    access = chunk * CHUNK + tl.arange(0, CHUNK)
    inside = access < accesses
    base = head.to(tl.int64) * accesses
    slot, event = _load(slots, events, access, base, accesses, K, FIRST)
    digit = tl.where(inside, (slot >> SHIFT) & (BINS - 1), BINS)
    hits = (digit[:, None] == tl.arange(0, BINS)[None, :]).to(tl.int32)
    rank = tl.sum(tl.cumsum(hits, 0) * hits, 1) - 1
    offset = tl.load(offsets + (head.to(tl.int64) * BINS + digit) * chunks + chunk, mask=inside, other=0)
    tl.store(placed_slots + base + offset + rank, slot, mask=inside)
    tl.store(placed_events + base + offset + rank, event, mask=inside)


def passes(num_slots: int) -> tuple[tuple[int, int], ...]:
    """Return (shift, bits) of each pass: as few passes as ``DIGIT_BITS`` allows, with nearly equal bits."""
    bits = max(1, (num_slots - 1).bit_length())
    each = math.ceil(bits / math.ceil(bits / DIGIT_BITS))
    return tuple((shift, min(each, bits - shift)) for shift in range(0, bits, each))


@dataclass(frozen=True)
class OrderScratch:
    """int32 scratch for sorting ``heads`` heads. The sorted accesses are in the pair of ``pairs`` written last."""

    pairs: tuple[tuple[Tensor, Tensor], ...]  # slots and events, [N, 2·T·K] each
    counts: Tensor
    offsets: Tensor

    @classmethod
    def of(cls, slots: Tensor, heads: int, num_slots: int) -> OrderScratch:
        """Allocate scratch for slots [≥ heads, T, K]."""
        accesses = 2 * slots.shape[1] * slots.shape[2]
        digits = passes(num_slots)
        entries = max(2**bits for _, bits in digits) * triton.cdiv(accesses, CHUNK)

        def empty(size: int) -> Tensor:
            return slots.new_empty(heads, size, dtype=torch.int32)

        pairs = tuple((empty(accesses), empty(accesses)) for _ in range(min(2, len(digits))))
        return cls(pairs, empty(entries), empty(entries))


def order(
    write_slots: Tensor, read_slots: Tensor, num_slots: int, scratch: OrderScratch
) -> tuple[list[Launch], Tensor, Tensor]:
    """Return the launches that sort the accesses of slots [N, T, K], and the sorted slots and events [≥ N, 2·T·K]."""
    heads, tokens, top_k = write_slots.shape
    accesses = 2 * tokens * top_k
    chunks = triton.cdiv(accesses, CHUNK)
    sources = write_slots, read_slots
    launches: list[Launch] = []
    for i, (shift, bits) in enumerate(passes(num_slots)):
        placed = scratch.pairs[i % 2]
        which = {"K": top_k, "FIRST": i == 0, "SHIFT": shift, "BINS": 2**bits, "CHUNK": CHUNK}
        given = {"slots": sources[0], "events": sources[1], "accesses": accesses, "chunks": chunks}
        table = 4 * heads * chunks * 2**bits
        listed = 4 * heads * accesses
        count = Work(heads * chunks, THREADS, listed + table, listed + table, barriers=2)
        launches.append(
            TritonLaunch(order_count, (heads * chunks,), {**given, "counts": scratch.counts, **which}, THREADS, count)
        )
        blocks = triton.cdiv(chunks * 2**bits, _BLOCK)
        offsets = Work(heads, THREADS, 2 * table, 2 * table, steps=blocks, barriers=4)
        entries = {"counts": scratch.counts, "offsets": scratch.offsets, "entries": chunks * 2**bits, "BLOCK": _BLOCK}
        launches.append(TritonLaunch(order_offsets, (heads,), entries, THREADS, offsets))
        # A scattered access writes 4 bytes of a sector of 32.
        place = Work(heads * chunks, THREADS, 4 * listed + table, (2 + 8 + 8 + 8) * listed, trips=2, barriers=4)
        outputs = {"offsets": scratch.offsets, "placed_slots": placed[0], "placed_events": placed[1]}
        launches.append(TritonLaunch(order_place, (heads * chunks,), {**given, **outputs, **which}, THREADS, place))
        sources = placed
    return launches, *sources
