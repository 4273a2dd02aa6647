"""Kernels shared by the scans that are parallel over slots: a segmented linear recurrence, cut into pieces.

Along the sorted accesses of a head, row_p = decay_p · row_(p−1) + weight_p · value_p, with decay 1 and weight 0 for
reads. At the first access of a slot, its initial row replaces row_(p−1). A piece is a fixed number of accesses of any
slots, so that a frequent slot is divided, too. The effect of a piece is a factor (a product of decays) on the row
before it, and a sum that is added. There are no divisions by decays.

A thread holds some channels of one row and scans a piece. Within a launch, threads communicate only to sum over a row's
channels.
"""

from __future__ import annotations

import triton
import triton.language as tl

from lowering.gpu.triton.arithmetic import decay, decay_slope


@triton.jit(do_not_specialize=["accesses", "padded"])
def piece_terms(
    slots, events, write_weights, read_weights, packed, starts, ends, decays, weights, slopes, accesses, padded,
    K: tl.constexpr, POWER: tl.constexpr, PROXY_EPS: tl.constexpr, SLOPE: tl.constexpr, BLOCK: tl.constexpr,
    ACC: tl.constexpr,
):  # fmt: skip
    """Compute, from sorted slots and events [N, 2·T·K], arrays [N, padded] by position: packed, twice the index in
    [T·K] plus 1 for a read, or −1 beyond the last access; starts and ends, the slot at its first and last access, else
    −1; decays; weights; and slopes of the decays."""
    blocks = tl.cdiv(padded, BLOCK)
    head = (tl.program_id(0) // blocks).to(tl.int64)
    position = tl.program_id(0) % blocks * BLOCK + tl.arange(0, BLOCK)
    inside = position < accesses
    at = head * accesses + position
    slot = tl.load(slots + at, mask=inside, other=-1)
    before = tl.load(slots + at - 1, mask=inside & (position > 0), other=-1)
    after = tl.load(slots + at + 1, mask=position < accesses - 1, other=-1)
    event = tl.load(events + at, mask=inside, other=0)
    token, lane = event // (2 * K), event % (2 * K)
    place = token * K + lane % K
    of = head * (accesses // 2) + place
    writes = inside & (lane < K)
    written = tl.load(write_weights + of, mask=writes, other=0.0).to(ACC)
    read = tl.load(read_weights + of, mask=inside & (lane >= K), other=0.0).to(ACC)
    to = head * padded + position
    kept = position < padded
    tl.store(packed + to, tl.where(inside, 2 * place + (lane >= K).to(tl.int32), -1), mask=kept)
    tl.store(starts + to, tl.where(slot != before, slot, -1), mask=kept)
    tl.store(ends + to, tl.where(slot != after, slot, -1), mask=kept)
    tl.store(decays + to, tl.where(writes, decay(written, POWER), 1.0), mask=kept)
    tl.store(weights + to, written + read, mask=kept)
    if SLOPE:
        tl.store(slopes + to, tl.where(writes, decay_slope(written, POWER, PROXY_EPS), 0.0), mask=kept)


@triton.jit
def access(packed, alive, K: tl.constexpr):
    """Unpack the accesses at ``packed``: whether they write, whether they read, their token, and their index in the
    head's [T·K]."""
    code = tl.load(packed, mask=alive, other=-1)
    place = code >> 1
    token = (place.to(tl.uint32) // K).to(tl.int32)
    return (code >= 0) & ((code & 1) == 0), (code >= 0) & ((code & 1) == 1), token, place


@triton.jit
def point(rows, first, D: tl.constexpr, D_PAD: tl.constexpr):
    """Return pointers [ROWS, D_PAD] to rows of [·, D]; offsets added to them can be 32-bit."""
    return rows + first[:, None] * D + tl.arange(0, D_PAD)[None, :]


@triton.jit
def _inside(there, D: tl.constexpr, D_PAD: tl.constexpr):
    if D == D_PAD:
        return there[:, None]
    else:
        return there[:, None] & (tl.arange(0, D_PAD) < D)[None, :]


@triton.jit
def load_row(pointers, row, there, D: tl.constexpr, D_PAD: tl.constexpr, ACC: tl.constexpr):
    """Load the rows at offset ``row`` from ``pointers``; 0 for those that are not ``there``."""
    return tl.load(pointers + (row * D)[:, None], mask=_inside(there, D, D_PAD), other=0.0).to(ACC)


@triton.jit
def store_row(pointers, row, there, x, D: tl.constexpr, D_PAD: tl.constexpr):
    """Store the rows at offset ``row`` from ``pointers``, except those that are not ``there``."""
    x = x.to(pointers.dtype.element_ty)
    tl.store(pointers + (row * D)[:, None], x, mask=_inside(there, D, D_PAD))


@triton.jit(do_not_specialize=["T", "M", "pieces", "all_pieces"])
def piece_sums(
    packed, starts, decays, weights, values, memory, row_sums, T, M, pieces, all_pieces,
    K: tl.constexpr, D: tl.constexpr, D_PAD: tl.constexpr, ROWS: tl.constexpr, PIECE: tl.constexpr,
    BATCH: tl.constexpr, ACC: tl.constexpr,
):  # fmt: skip
    """Compute row_sums [N, pieces, D]: the row after a piece is gain · (row before it) + sum."""
    piece = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    alive = piece < all_pieces
    head = (piece // pieces).to(tl.int64)
    x = tl.zeros([ROWS, D_PAD], ACC)
    at = piece.to(tl.int64) * PIECE
    value_rows, memory_rows = point(values, head * T, D, D_PAD), point(memory, head * M, D, D_PAD)
    for _ in range(0, PIECE // BATCH):
        for j in tl.static_range(BATCH):
            writes, _, token, _ = access(packed + at + j, alive, K)
            start = tl.load(starts + at + j, mask=alive, other=-1)
            factor = tl.load(decays + at + j, mask=alive, other=1.0)
            weight = tl.load(weights + at + j, mask=writes, other=0.0)
            value = load_row(value_rows, token, writes, D, D_PAD, ACC)
            first = load_row(memory_rows, start, start >= 0, D, D_PAD, ACC)
            x = factor[:, None] * tl.where(start[:, None] >= 0, first, x) + weight[:, None] * value
        at += BATCH
    store_row(point(row_sums, piece.to(tl.int64), D, D_PAD), piece * 0, alive, x, D, D_PAD)


@triton.jit(do_not_specialize=["pieces"])
def piece_carries(
    gains, row_sums, mass_sums, rows, masses, pieces,
    D: tl.constexpr, D_PAD: tl.constexpr, REVERSE: tl.constexpr, BATCH: tl.constexpr, ACC: tl.constexpr,
):  # fmt: skip
    """Compute the row and mass before each piece (REVERSE: after it), rows [N, pieces, D] and masses [N, pieces]."""
    channel = tl.arange(0, D_PAD)
    base = tl.program_id(0).to(tl.int64) * pieces
    x = tl.zeros([D_PAD], ACC)
    z = tl.full([], 0, ACC)
    for start in range(0, pieces, BATCH):
        loaded = ()
        for j in tl.static_range(BATCH):
            step = start + j
            at = base + (pieces - 1 - step if REVERSE else step)
            inside = step < pieces
            gain = tl.load(gains + at, mask=inside, other=1.0)
            mass_sum = tl.load(mass_sums + at, mask=inside, other=0.0)
            row_sum = tl.load(row_sums + at * D + channel, mask=inside & (channel < D), other=0.0)
            loaded += ((gain, mass_sum, row_sum),)
        for j in tl.static_range(BATCH):
            step = start + j
            at = base + (pieces - 1 - step if REVERSE else step)
            inside = step < pieces
            gain, mass_sum, row_sum = loaded[j]
            tl.store(rows + at * D + channel, x, mask=inside & (channel < D))
            tl.store(masses + at, z, mask=inside)
            # At the first access of a slot the gain is 0. The row before it is selected away: 0 · inf would be NaN.
            x = tl.where(gain == 0, row_sum, gain * x + row_sum)
            z = tl.where(gain == 0, mass_sum, gain * z + mass_sum)


@triton.jit(do_not_specialize=["tokens"])
def sum_accesses(
    parts, out, tokens, K: tl.constexpr, D: tl.constexpr, D_PAD: tl.constexpr, ROWS: tl.constexpr, ACC: tl.constexpr
):
    """Compute out [tokens, D] = Σ_k parts [tokens, K, D], in the order of k."""
    token = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    alive = token < tokens
    x = tl.zeros([ROWS, D_PAD], ACC)
    none = tl.zeros([ROWS], tl.int32)
    rows = point(parts, token * K, D, D_PAD)
    for k in tl.static_range(K):
        x += load_row(rows, none + k, alive, D, D_PAD, ACC)
    store_row(point(out, token, D, D_PAD), none, alive, x, D, D_PAD)
