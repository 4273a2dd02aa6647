"""Device functions for the K best addresses of a product softmax (paper, steps 2 and 3); each thread decodes one row.

The beam of the K best prefixes is extended by one sub-vector at a time. The digits of the sub-vector are sorted.
Extending the beam by the j-th best digit gives a sorted list, of which at most K/(j + 1) entries can be among the best
K. Lists are merged as in bitonic sort or, if few entries can survive, by insertion. A prefix's score is its
log-probability relative to that of the best prefix, which is 0. A row with a NaN gets weights of NaN, and slots that
are still distinct and in range.
"""

from __future__ import annotations

import triton
import triton.language as tl

from lowering.gpu.triton.ranked import columns, insert, keep_larger, sort_bitonic

# Replaces -inf and NaN among logits. A prefix that contains it must still rank above NOTHING, an empty place in the
# beam.
_LOWEST = tl.constexpr(-1e30)
_NOTHING = tl.constexpr(float("-inf"))


@triton.jit
def best_addresses(
    rows, scale, U: tl.constexpr, P: tl.constexpr, K: tl.constexpr, COUNT: tl.constexpr, ROUNDS: tl.constexpr,
    UNROLL: tl.constexpr, ACC: tl.constexpr,
):  # fmt: skip
    """Return scores and slots of the 2^ROUNDS ≥ K best prefixes, descending, and Π_u Σ_p e^(logit − max); all [COUNT].

    Args:
        rows: pointers to logits [U, P], [COUNT].
        scale: factors of the rows' logits, [COUNT], or None.
        UNROLL: what is unrolled: 0 nothing, 1 the code of one sub-vector, 2 that of all U sub-vectors.
    """
    RANKS: tl.constexpr = min(P, K)
    scores, slots, norm = _digits(rows, scale, P, RANKS, COUNT, UNROLL > 0, ACC)
    for _ in tl.static_range(RANKS, 1 << ROUNDS):
        scores, slots = scores + (tl.full((COUNT,), _NOTHING, ACC),), slots + (tl.zeros((COUNT,), tl.int32),)
    step = tl.full((), P, tl.int32)
    if UNROLL == 2:
        for u in tl.static_range(1, U):
            scores, slots, total = _extend(
                scores, slots, rows + u * P, scale, step, P, K, min(K, P**u), COUNT, ROUNDS, True, ACC
            )
            norm *= total
            step *= P
    else:
        for u in range(1, U):
            scores, slots, total = _extend(
                scores, slots, rows + u * P, scale, step, P, K, K, COUNT, ROUNDS, UNROLL == 1, ACC
            )
            norm *= total
            step *= P
    return scores, slots, norm


@triton.jit
def _digits(
    rows, scale, P: tl.constexpr, RANKS: tl.constexpr, COUNT: tl.constexpr, STRAIGHT: tl.constexpr, ACC: tl.constexpr
):
    """Return the RANKS best of (logit − maximum)·scale of a sub-vector, their digits, and the sum of all their e^….

    The best is exactly 0, so the sum is at least 1 and no weight exceeds 1. The best of logit·scale − maximum would not
    be 0: compilers fuse these operations, and then the product is not rounded as the maximum's was.
    """
    total = tl.zeros((COUNT,), ACC)
    scores, digits = (), ()
    if STRAIGHT:
        logits = load_logits(rows, scale is None, P, COUNT, ACC)
        largest = logits[0]
        for p in tl.static_range(1, P):
            largest = tl.maximum(largest, logits[p])
        for p in tl.static_range(P):
            above = _scaled(logits[p] - largest, scale)
            total += tl.exp(above)
            above = tl.where(above > _LOWEST, above, _LOWEST)
            scores, digits = insert(scores, digits, above, tl.full((COUNT,), p, tl.int32), 0, RANKS)
    else:
        largest = tl.full((COUNT,), _NOTHING, ACC)
        for p in range(P):
            largest = tl.maximum(largest, tl.load(rows + p).to(ACC))
        for _ in tl.static_range(RANKS):
            scores, digits = scores + (tl.full((COUNT,), _NOTHING, ACC),), digits + (tl.zeros((COUNT,), tl.int32),)
        for p in range(P):
            above = _scaled(tl.load(rows + p).to(ACC) - largest, scale)
            total += tl.exp(above)
            above = tl.where(above > _LOWEST, above, _LOWEST)
            scores, digits = insert(scores, digits, above, tl.zeros((COUNT,), tl.int32) + p, 0, RANKS)
    return scores, digits, total


@triton.jit
def load_logits(rows, WHOLE: tl.constexpr, P: tl.constexpr, COUNT: tl.constexpr, ACC: tl.constexpr):
    """Load a sub-vector's logits as a tuple; each thread loads its whole row at once if ``WHOLE`` and P allows it."""
    logits = ()
    if WHOLE and P & (P - 1) == 0:
        found = columns(tl.load(rows[:, None] + tl.arange(0, P)[None, :]), COUNT, (P - 1).bit_length())
        for p in tl.static_range(P):
            logits = logits + (found[p].to(ACC),)
    else:
        for p in tl.static_range(P):
            logits = logits + (tl.load(rows + p).to(ACC),)
    return logits


@triton.jit
def _scaled(logit, scale):
    if scale is None:
        return logit
    else:
        return logit * scale


@triton.jit
def _extend(
    scores, slots, rows, scale, step, P: tl.constexpr, K: tl.constexpr, PREFIXES: tl.constexpr, COUNT: tl.constexpr,
    ROUNDS: tl.constexpr, STRAIGHT: tl.constexpr, ACC: tl.constexpr,
):  # fmt: skip
    """Extend the beam, which holds PREFIXES entries, by the sub-vector at ``rows``; ``step`` is P^u."""
    RANKS: tl.constexpr = min(P, K)
    digit_scores, digits, total = _digits(rows, scale, P, RANKS, COUNT, STRAIGHT, ACC)
    # The best digit's score is 0.
    joined_scores, joined_slots = scores, ()
    for i in tl.static_range(len(slots)):
        joined_slots = joined_slots + (slots[i] + digits[0] * step,)
    if STRAIGHT:
        for j in tl.static_range(1, RANKS):
            joined_scores, joined_slots = _join(
                joined_scores, joined_slots, scores, slots, digit_scores[j], digits[j] * step, j,
                min(K // (j + 1), PREFIXES), K, ROUNDS,
            )  # fmt: skip
    elif RANKS > 1:
        for _ in range(1, RANKS):
            # Registers cannot be indexed at run time, so the next digit is moved to the front.
            digit_scores, digits = digit_scores[1:] + (digit_scores[0],), digits[1:] + (digits[0],)
            joined_scores, joined_slots = keep_larger(
                joined_scores, joined_slots, scores, slots, digit_scores[0], digits[0] * step, K // 2
            )
            joined_scores, joined_slots = sort_bitonic(joined_scores, joined_slots, ROUNDS)
    return joined_scores, joined_slots, total


@triton.jit
def _join(
    scores, slots, prefixes, prefix_slots, score, slot, J: tl.constexpr, COUNT: tl.constexpr, K: tl.constexpr,
    ROUNDS: tl.constexpr,
):  # fmt: skip
    """Merge the COUNT best prefixes, extended by the digit of rank J, into the list, by the cheaper of two algorithms.

    Prefix i comes after at least (i + 1)·(J + 1) − 1 entries: those whose two ranks are at most i and J.
    """
    if COUNT * (K + 1) - (J + 1) * COUNT * (COUNT + 1) // 2 < ROUNDS << ROUNDS >> 1:
        for i in tl.static_range(COUNT):
            scores, slots = insert(scores, slots, prefixes[i] + score, prefix_slots[i] + slot, (i + 1) * (J + 1) - 1, K)
    else:
        scores, slots = keep_larger(scores, slots, prefixes, prefix_slots, score, slot, COUNT)
        scores, slots = sort_bitonic(scores, slots, ROUNDS)
    return scores, slots
