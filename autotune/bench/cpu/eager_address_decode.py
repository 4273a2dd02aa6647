"""Address decoding in eager PyTorch. Each form takes logits [rows, U, P] and K and returns int32 slots and weights."""

from __future__ import annotations

import torch
from torch import Tensor


def decode_full(logits: Tensor, top_k: int) -> tuple[Tensor, Tensor]:
    """The paper's formulas: the product of the softmaxes with all its M entries, then torch.topk."""
    product = logits.new_ones(logits.shape[0], 1)
    for u in range(logits.shape[1]):
        # The first sub-vector is the least significant digit.
        product = (logits[:, u].softmax(-1).unsqueeze(2) * product.unsqueeze(1)).flatten(1)
    weights, slots = product.topk(top_k)
    return slots.int(), weights


def decode_beams(logits: Tensor, top_k: int) -> tuple[Tensor, Tensor]:
    """The K best prefixes, one sub-vector at a time, with torch.topk."""
    rows, order, sub_dim = logits.shape
    log_p = logits.log_softmax(-1)
    best, slots = log_p[:, 0], torch.arange(sub_dim).expand(rows, -1)
    for u in range(1, order):
        scores = (log_p[:, u].unsqueeze(2) + best.unsqueeze(1)).flatten(1)
        prefixes = (torch.arange(sub_dim).unsqueeze(1) * sub_dim**u + slots.unsqueeze(1)).flatten(1)
        best, chosen = scores.topk(min(top_k, scores.shape[1]), sorted=u == order - 1)
        slots = prefixes.gather(1, chosen)
    if best.shape[1] > top_k or order == 1:
        best, chosen = best.topk(top_k)
        slots = slots.gather(1, chosen)
    return slots.int(), best.exp()


def decode_merged(logits: Tensor, top_k: int) -> tuple[Tensor, Tensor]:
    """The K best prefixes by a merging network over all rows, without topk; the fastest form found.

    Score and slot share an int64, so that a comparison moves both. The P extensions of a sorted list of prefixes are
    sorted lists. The best half of two such lists is the elementwise minimum of one and the other reversed, a bitonic
    list that is sorted in log K rounds. Needs M ≥ K, both powers of two.
    """
    rows, order, sub_dim = logits.shape
    # Negated scores are non-negative floats, whose order as integers is the same. [U, P, rows]: rows are last for long
    # vectors.
    cost = logits.permute(1, 2, 0).log_softmax(1).neg().abs()
    best, slots = cost.new_zeros(1, rows), torch.zeros(1, rows, dtype=torch.int64)
    for u in range(order):
        digits = torch.arange(sub_dim).view(-1, 1, 1) * sub_dim**u
        costs = best + cost[u].unsqueeze(1)  # [P, prefixes, rows]
        lists = (costs.view(torch.int32).long() << 32) | (slots + digits)
        while lists.shape[0] > 1:
            lists = _merge(lists[0::2], lists[1::2].flip(1), top_k)
        best = (lists[0] >> 32).int().view(torch.float32)
        slots = lists[0] & 0xFFFFFFFF
    return slots.t().int().contiguous(), best.neg().exp().t().contiguous()


def _merge(first: Tensor, reversed_second: Tensor, top_k: int) -> Tensor:
    """The top_k smallest of pairs of sorted lists [pairs, length, rows], sorted; the second reversed."""
    length = first.shape[1]
    low = torch.minimum(first, reversed_second)
    if length < top_k:
        low = torch.cat([low, torch.maximum(first, reversed_second)], 1)
    half = length // 2
    pairs, kept, rows = low.shape
    while half:
        a, b = low.view(pairs, kept // (2 * half), 2, half, rows).unbind(2)
        low = torch.stack([torch.minimum(a, b), torch.maximum(a, b)], 2).view(pairs, kept, rows)
        half //= 2
    return low
