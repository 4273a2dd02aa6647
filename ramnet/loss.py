"""The cross entropy of a language model, computed without holding all logits in memory at once."""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from ramnet.ids import check_range, check_type

IGNORED = -100  # labels of this value do not contribute to the loss
# Elements, 64 MB in float32: 512 tokens of a vocabulary of 32 000, which is still a large matrix product.
LOGITS_AT_ONCE = 2**24


def summed_cross_entropy(head: Callable[[Tensor], Tensor], hidden: Tensor, labels: Tensor, vocab_size: int) -> Tensor:
    """Sum −log softmax(head(hidden))[label] over tokens, in nats.

    At most ``LOGITS_AT_ONCE`` logits (or those of one token) exist at a time. If there are more in all, the backward
    pass recomputes them.

    Args:
        head: maps hidden states [n, C] to logits [n, V].
        hidden: [N, C].
        labels: int64 [N], the token that each row of ``hidden`` predicts (not shifted), or ``IGNORED``.
        vocab_size: V.

    Returns:
        A float32 scalar, float64 if the logits are.
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
    """Raise ValueError if ``labels`` differs from ``input_ids`` in shape or, on the CPU, holds a label outside the
    vocabulary; TypeError if it is neither int64 nor int32."""
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
    """Return the label that each token but the last predicts, int64 [B, T − 1]: that of the token after it.

    Padding between the two is skipped. It is ``IGNORED`` for padding, for the last token of a row, and if the next
    begins a document. The arguments are those of ``RamNetForCausalLM.forward``.
    """
    wanted = labels[:, 1:].long()
    if attention_mask is not None:
        taken, end = attention_mask.bool(), labels.shape[1]
        columns = torch.arange(end, device=labels.device)
        # The first token at or after each column, or T if there is none.
        following = columns.where(taken, end).flip(1).cummin(1).values.flip(1)[:, 1:]
        wanted = labels.long().gather(1, following.clamp(max=end - 1))
        wanted = wanted.masked_fill(~taken[:, :-1] | (following == end), IGNORED)
    if cu_seqlens is not None:
        begins = torch.zeros(labels.shape[1] + 1, dtype=torch.bool, device=labels.device)
        begins[cu_seqlens.long()] = True
        wanted = wanted.masked_fill(begins[1:-1], IGNORED)
    return wanted
