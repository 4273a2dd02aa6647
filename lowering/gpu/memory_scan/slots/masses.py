"""The mass along sorted accesses, with one thread per piece."""

from __future__ import annotations

import triton
import triton.language as tl

from lowering.gpu.memory_scan.slots.pieces import access


@triton.jit(do_not_specialize=["M", "pieces", "all_pieces"])
def mass_pieces(
    packed, starts, decays, weights, mass, gains, mass_sums, M, pieces, all_pieces,
    K: tl.constexpr, PIECE: tl.constexpr, BATCH: tl.constexpr, ACC: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Compute gains and mass_sums [N, pieces]: the mass after a piece is gain · (mass before it) + sum."""
    piece = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    alive = piece < all_pieces
    mass += (piece // pieces).to(tl.int64) * M
    gain = tl.full([BLOCK], 1, ACC)
    z = tl.zeros([BLOCK], ACC)
    at = piece.to(tl.int64) * PIECE
    for _ in range(0, PIECE // BATCH):
        for j in tl.static_range(BATCH):
            writes, _, _, _ = access(packed + at + j, alive, K)
            start = tl.load(starts + at + j, mask=alive, other=-1)
            factor = tl.load(decays + at + j, mask=alive, other=1.0)
            weight = tl.load(weights + at + j, mask=writes, other=0.0)
            first = tl.load(mass + start, mask=start >= 0, other=0.0).to(ACC)
            gain = tl.where(start >= 0, 0.0, gain) * factor
            z = factor * tl.where(start >= 0, first, z) + weight
        at += BATCH
    tl.store(gains + piece, gain, mask=alive)
    tl.store(mass_sums + piece, z, mask=alive)


@triton.jit(do_not_specialize=["M", "pieces", "all_pieces"])
def mass_scan(
    packed, starts, ends, decays, weights, slopes, mass, masses, new_mass, mass_terms, M, pieces, all_pieces,
    K: tl.constexpr, PIECE: tl.constexpr, BATCH: tl.constexpr, ACC: tl.constexpr, EPS: tl.constexpr,
    BLOCK: tl.constexpr, BACKWARD: tl.constexpr,
):  # fmt: skip
    """Run each piece forward, replacing the weight r of each read by r/(z + ε). Also stores the final mass or, for the
    backward, mass_terms: 1/(z + ε) of a read, ∂z/∂w of a write."""
    piece = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    alive = piece < all_pieces
    head = (piece // pieces).to(tl.int64)
    mass += head * M
    new_mass += head * M
    z = tl.load(masses + piece, mask=alive, other=0.0)
    at = piece.to(tl.int64) * PIECE
    for _ in range(0, PIECE // BATCH):
        # All loads of a batch are issued before its stores, because no load can pass a store.
        loaded = ()
        for j in tl.static_range(BATCH):
            _, reads, _, _ = access(packed + at + j, alive, K)
            start = tl.load(starts + at + j, mask=alive, other=-1)
            end = tl.load(ends + at + j, mask=alive, other=-1)
            factor = tl.load(decays + at + j, mask=alive, other=1.0)
            weight = tl.load(weights + at + j, mask=alive, other=0.0)
            slope = tl.load(slopes + at + j, mask=alive, other=0.0) if BACKWARD else weight * 0
            loaded += ((reads, start, end, factor, weight, slope),)
        for j in tl.static_range(BATCH):
            reads, start, end, factor, weight, slope = loaded[j]
            z = tl.where(start >= 0, tl.load(mass + start, mask=start >= 0, other=0.0).to(ACC), z)
            of_weight = 1 + slope * z
            z = factor * z + tl.where(reads, 0.0, weight)
            inverse = 1 / (z + EPS)
            tl.store(weights + at + j, weight * inverse, mask=reads)
            if BACKWARD:
                tl.store(mass_terms + at + j, tl.where(reads, inverse, of_weight), mask=alive)
            else:
                tl.store(new_mass + end, z.to(new_mass.dtype.element_ty), mask=end >= 0)
        at += BATCH
