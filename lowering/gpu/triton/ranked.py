"""Lists of (score, label) pairs, the best first, in a thread's registers; they run inside kernels.

A list is a tuple of scores and a tuple of int32 labels; entry i of all threads' lists is one tensor, so a thread
compares and exchanges what is its own and waits for nobody. Scores move by maximum and minimum: chains of selections
take LLVM minutes.
"""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def insert(scores, labels, score, label, FIRST: tl.constexpr, MOST: tl.constexpr):
    """Put a pair in a descending list, at FIRST or later.

    The list grows to MOST entries; then what falls off the MOST best is lost.
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
    """Join a descending list with the first COUNT entries of ``others``, each plus ``score`` (``label``).

    The larger of entry i and of the others' entry WIDTH − 1 − i, for every i, are the best of both, bitonic.
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
    """A bitonic list of 2^ROUNDS entries, descending."""
    for r in tl.static_range(ROUNDS):
        scores, labels = _exchange_all(scores, labels, 1 << (ROUNDS - 1 - r))
    return scores, labels


@triton.jit
def _exchange_all(scores, labels, STRIDE: tl.constexpr):
    """The better of every two entries STRIDE apart goes before the other."""
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
    """[ROWS, 2^ROUNDS] as a tuple of its columns."""
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
    """2^ROUNDS columns as one tensor [ROWS, 2^ROUNDS]: a thread stores its list at once."""
    for r in tl.static_range(ROUNDS):
        joined = ()
        for i in tl.static_range(len(parts) // 2):
            joined = joined + (tl.join(parts[i], parts[i + len(parts) // 2]),)
        parts = joined
    return tl.reshape(parts[0], (ROWS, 1 << ROUNDS))
