"""Device functions on descending lists of (score, label) pairs in a thread's registers.

A list is a tuple of scores and a tuple of int32 labels. Each entry is a tensor over threads, so a thread compares and
exchanges only its own values, without communication. Scores are exchanged by maximum and minimum, because LLVM takes
minutes to compile long chains of selections.
"""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def insert(scores, labels, score, label, FIRST: tl.constexpr, MOST: tl.constexpr):
    """Insert a pair into a descending list, at index FIRST or later.

    The list grows up to MOST entries; beyond that, the smallest is dropped.
    """
    kept_scores, kept_labels = scores[:FIRST], labels[:FIRST]
    for i in tl.static_range(FIRST, min(len(scores), MOST)):
        above = score > scores[i]
        kept_scores = kept_scores + (tl.maximum(scores[i], score),)
        kept_labels = kept_labels + (tl.where(above, label, labels[i]),)
        score, label = tl.minimum(scores[i], score), tl.where(above, labels[i], label)
    if len(scores) < MOST:
        kept_scores, kept_labels = kept_scores + (score,), kept_labels + (label,)
    kept_scores, kept_labels = kept_scores + scores[MOST:], kept_labels + labels[MOST:]
    return kept_scores, kept_labels


@triton.jit
def keep_larger(scores, labels, others, other_labels, score, label, COUNT: tl.constexpr):
    """Merge a descending list with the first COUNT entries of ``others``, to which ``score`` and ``label`` are added.

    The result, the larger of entry i and entry WIDTH − 1 − i of the others for every i, is a bitonic list of the best.
    """
    WIDTH: tl.constexpr = len(scores)
    kept_scores, kept_labels = scores[: WIDTH - COUNT], labels[: WIDTH - COUNT]
    for i in tl.static_range(WIDTH - COUNT, WIDTH):
        other = others[WIDTH - 1 - i] + score
        above = other > scores[i]
        kept_scores = kept_scores + (tl.maximum(scores[i], other),)
        kept_labels = kept_labels + (tl.where(above, other_labels[WIDTH - 1 - i] + label, labels[i]),)
    return kept_scores, kept_labels


@triton.jit
def sort_bitonic(scores, labels, ROUNDS: tl.constexpr):
    """Sort a bitonic list of 2^ROUNDS entries, descending."""
    for r in tl.static_range(ROUNDS):
        scores, labels = _exchange_all(scores, labels, 1 << (ROUNDS - 1 - r))
    return scores, labels


@triton.jit
def _exchange_all(scores, labels, STRIDE: tl.constexpr):
    """Compare-exchange all pairs of entries STRIDE apart, so that the larger comes first."""
    all_scores, all_labels = (), ()
    for first in tl.static_range(0, len(scores), 2 * STRIDE):
        low_scores, low_labels = (), ()
        for i in tl.static_range(first, first + STRIDE):
            above = scores[i + STRIDE] > scores[i]
            all_scores = all_scores + (tl.maximum(scores[i], scores[i + STRIDE]),)
            all_labels = all_labels + (tl.where(above, labels[i + STRIDE], labels[i]),)
            low_scores = low_scores + (tl.minimum(scores[i], scores[i + STRIDE]),)
            low_labels = low_labels + (tl.where(above, labels[i], labels[i + STRIDE]),)
        all_scores, all_labels = all_scores + low_scores, all_labels + low_labels
    return all_scores, all_labels


@triton.jit
def columns(tile, ROWS: tl.constexpr, ROUNDS: tl.constexpr):
    """Split a tensor [ROWS, 2^ROUNDS] into a tuple of its columns."""
    parts = (tile,)
    for r in tl.static_range(ROUNDS):
        even, odd = (), ()
        for i in tl.static_range(len(parts)):
            pair = tl.split(tl.reshape(parts[i], (ROWS, 1 << (ROUNDS - 1 - r), 2)))
            even, odd = even + (pair[0],), odd + (pair[1],)
        parts = even + odd
    flat = ()
    for i in tl.static_range(len(parts)):
        flat = flat + (tl.reshape(parts[i], (ROWS,)),)
    return flat


@triton.jit
def side_by_side(parts, ROWS: tl.constexpr, ROUNDS: tl.constexpr):
    """Join 2^ROUNDS columns to a tensor [ROWS, 2^ROUNDS], so that a thread stores its list at once."""
    for r in tl.static_range(ROUNDS):
        joined = ()
        for i in tl.static_range(len(parts) // 2):
            joined = joined + (tl.join(parts[i], parts[i + len(parts) // 2]),)
        parts = joined
    return tl.reshape(parts[0], (ROWS, 1 << ROUNDS))
