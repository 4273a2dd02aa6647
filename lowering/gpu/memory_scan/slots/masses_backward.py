"""Gradients of the mass and the weights in the scan over slots, with one thread per piece."""

from __future__ import annotations

import triton
import triton.language as tl

from lowering.gpu.memory_scan.slots.pieces import access


@triton.jit(do_not_specialize=["T", "M", "pieces", "all_pieces"])
def mass_reads(
    packed, starts, ends, decays, weights, products, mass_terms, grad_mass, grad_read, gains, mass_sums,
    T, M, pieces, all_pieces,
    K: tl.constexpr, PIECE: tl.constexpr, BATCH: tl.constexpr, ACC: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Run each piece forward. From products ⟨∂o, row⟩ of reads, compute the gradients of read weights and replace their
    mass_terms by what they add to the mass's gradient; gains and mass_sums describe the piece's reverse pass."""
    piece = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    alive = piece < all_pieces
    head = (piece // pieces).to(tl.int64)
    gain = tl.full([BLOCK], 1, ACC)
    y = tl.zeros([BLOCK], ACC)
    grad_mass += head * M
    grad_read += head * T * K
    at = piece.to(tl.int64) * PIECE
    for _ in range(0, PIECE // BATCH):
        loaded = ()
        for j in tl.static_range(BATCH):
            _, reads, _, place = access(packed + at + j, alive, K)
            start = tl.load(starts + at + j, mask=alive, other=-1)
            end = tl.load(ends + at + j, mask=alive, other=-1)
            factor = tl.load(decays + at + j, mask=alive, other=1.0)
            weight = tl.load(weights + at + j, mask=alive, other=0.0)
            inverse = tl.load(mass_terms + at + j, mask=reads, other=0.0)
            product = tl.load(products + at + j, mask=reads, other=0.0)
            loaded += ((reads, place, start, end, factor, weight, inverse, product),)
        for j in tl.static_range(BATCH):
            reads, place, start, end, factor, weight, inverse, product = loaded[j]
            begins, stops = start >= 0, end >= 0
            push = tl.where(reads, -product * weight * inverse, 0.0)
            tl.store(mass_terms + at + j, push, mask=reads)
            tl.store(grad_read + place, (product * inverse).to(grad_read.dtype.element_ty), mask=reads)
            last = tl.load(grad_mass + end, mask=stops, other=0.0).to(ACC)
            gain = tl.where(begins, 0.0, gain) * factor
            y += tl.where(gain == 0, 0.0, gain * (push + last))
            gain = tl.where(stops, 0.0, gain)
        at += BATCH
    tl.store(gains + piece, gain, mask=alive)
    tl.store(mass_sums + piece, y, mask=alive)


@triton.jit(do_not_specialize=["T", "M", "pieces", "all_pieces"])
def mass_writes(
    packed, starts, ends, decays, products, mass_terms, masses, grad_mass, grad_write, new_grad_mass,
    T, M, pieces, all_pieces,
    K: tl.constexpr, PIECE: tl.constexpr, BATCH: tl.constexpr, ACC: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Run each piece in reverse from the mass's gradient after it. From products ⟨G, ∂row/∂w⟩ of writes, compute the
    gradients of write weights and of the initial mass."""
    piece = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    alive = piece < all_pieces
    head = (piece // pieces).to(tl.int64)
    y = tl.load(masses + piece, mask=alive, other=0.0)
    grad_mass += head * M
    new_grad_mass += head * M
    grad_write += head * T * K
    at = piece.to(tl.int64) * PIECE + (PIECE - 1)
    for _ in range(0, PIECE // BATCH):
        loaded = ()
        for j in tl.static_range(BATCH):
            writes, reads, _, place = access(packed + at - j, alive, K)
            start = tl.load(starts + at - j, mask=alive, other=-1)
            end = tl.load(ends + at - j, mask=alive, other=-1)
            factor = tl.load(decays + at - j, mask=alive, other=1.0)
            term = tl.load(mass_terms + at - j, mask=alive, other=0.0)
            product = tl.load(products + at - j, mask=writes, other=0.0)
            loaded += ((writes, reads, place, start, end, factor, term, product),)
        for j in tl.static_range(BATCH):
            writes, reads, place, start, end, factor, term, product = loaded[j]
            begins, stops = start >= 0, end >= 0
            last = tl.load(grad_mass + end, mask=stops, other=0.0).to(ACC)
            y = tl.where(stops, last, y) + tl.where(reads, term, 0.0)
            tl.store(grad_write + place, (product + y * term).to(grad_write.dtype.element_ty), mask=writes)
            y = factor * y
            tl.store(new_grad_mass + start, y.to(new_grad_mass.dtype.element_ty), mask=begins)
        at -= BATCH
