"""The cross entropy of a language model, without all of its logits in memory at once."""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from ramnet.ids import check_range, check_type

IGNORED = -100  # a label that counts for nothing
# Numbers, 64 MB in float32: 512 tokens of a vocabulary of 32 000, still a large matrix product.
LOGITS_AT_ONCE = 2**24


def summed_cross_entropy(head: Callable[[Tensor], Tensor], hidden: Tensor, labels: Tensor, vocab_size: int) -> Tensor:
    """The sum over tokens of −log softmax(head(hidden))[label], in nats; a float32 (float64) scalar.

    At most ``LOGITS_AT_ONCE`` logits exist at a time, in the backward pass too, which computes them again where
    they are more.

    Args:
        head: logits [n, V] of [n, C].
        hidden: [N, C].
        labels: int64 [N]; the token that each ``hidden`` is to predict, not shifted. ``IGNORED`` counts for nothing.
        vocab_size: V.
    """

    def part(hidden: Tensor, labels: Tensor) -> Tensor:
        logits = head(hidden)
        exact = logits.to(torch.promote_types(logits.dtype, torch.float32))
        return F.cross_entropy(exact, labels, ignore_index=IGNORED, reduction="sum")

    tokens = max(1, LOGITS_AT_ONCE // vocab_size)
    if hidden.shape[0] <= tokens:
        return part(hidden, labels)
    parts = zip(hidden.split(tokens), labels.split(tokens), strict=True)
    return torch.stack([checkpoint(part, *each, use_reentrant=False) for each in parts]).sum()


def check_labels(labels: Tensor, input_ids: Tensor, vocab_size: int) -> None:
    """ValueError for labels of another shape than ``input_ids`` or, on the CPU, outside the vocabulary; TypeError for
    other types."""
    check_type(labels, "labels")
    if labels.shape != input_ids.shape:
        raise ValueError(
            f"labels has shape {list(labels.shape)}; it must be that of input_ids, {list(input_ids.shape)}"
        )
    if labels.device.type == "cpu" and not torch.compiler.is_compiling():
        counted = labels[labels != IGNORED]
        if counted.numel():
            check_range(counted, vocab_size, "labels")


def next_labels(labels: Tensor, attention_mask: Tensor | None, cu_seqlens: Tensor | None) -> Tensor:
    """What each token but the last is to predict, int64 [B, T − 1].

    ``IGNORED`` to and from padding, and from one document to the next. Arguments as in ``RamNetForCausalLM.forward``.
    """
    wanted = labels[:, 1:].long()
    if attention_mask is not None:
        taken = attention_mask.bool()
        wanted = wanted.masked_fill(~(taken[:, :-1] & taken[:, 1:]), IGNORED)
    if cu_seqlens is not None:
        begins = torch.zeros(labels.shape[1] + 1, dtype=torch.bool, device=labels.device)
        begins[cu_seqlens.long()] = True
        wanted = wanted.masked_fill(begins[1:-1], IGNORED)
    return wanted
