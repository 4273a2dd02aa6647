"""Prompt reading in chunks of bounded size."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor

from ramnet.config import RamNetConfig
from ramnet.generation.options import TOKENS_AT_ONCE
from ramnet.ops.packed import alike
from ramnet.state import RamState


class LanguageModel(Protocol):
    """The interface that ``generate`` needs; ``RamNetForCausalLM`` and ``export``'s ``OnnxSession`` implement it."""

    @property
    def config(self) -> RamNetConfig: ...

    def __call__(self, input_ids: Tensor, state: Any = None, *, in_place: bool = False) -> Any: ...


class Prompts(NamedTuple):
    """Prompts, as in ``generate`` and already checked.

    Attributes:
        input_ids: [B, T].
        state: the state before them, or None.
        attention_mask: [B, T], or None without padding.
        ends_alone: a row that has stopped keeps its state while other rows continue.
    """

    input_ids: Tensor
    state: Any = None
    attention_mask: Tensor | None = None
    ends_alone: bool = False


@dataclass(frozen=True)
class Generated:
    """The tokens generated for each row.

    Attributes:
        tokens: int64 [B, n]; a row that stopped repeats its last token.
        lengths: int64 [B], the number of tokens of each row up to and including its stop.
        state: the state after the prompt and all of ``tokens``; meaningful only if it was requested.
    """

    tokens: Tensor
    lengths: Tensor
    state: Any


def read(
    model: LanguageModel, input_ids: Tensor, state: Any, in_place: bool, attention_mask: Tensor | None = None
) -> tuple[Tensor, Any]:
    """Return the logits [B, V] after the last of ``input_ids`` [B, T], T ≥ 1, and the state there.

    Args:
        in_place: ``state`` may be updated in place; otherwise it is not modified.
        attention_mask: [B, T], 0 for padding, if the model supports one.
    """
    if attention_mask is None or input_ids.shape[1] == 1:
        return _read(model, input_ids, state, in_place, attention_mask)
    # Prompts of similar lengths are read together, as a long prompt would have all others padded to its length.
    tokens = input_ids.shape[1]
    lengths = (tokens - attention_mask.to(torch.uint8).argmax(dim=1)).tolist()
    groups = alike(lengths)
    if len(groups) == 1:
        return _read(model, input_ids, state, in_place, attention_mask)
    read = []
    for group in groups:
        rows = torch.tensor(group, device=input_ids.device)
        begin = tokens - max(lengths[row] for row in group)
        before = None if state is None else state.reorder(rows)
        read.append(_read(model, input_ids[rows, begin:], before, in_place, attention_mask[rows, begin:]))
    logits, states = zip(*read, strict=True)
    order = torch.tensor([row for group in groups for row in group], device=input_ids.device).argsort()
    return torch.cat(logits)[order], RamState.merge(states).reorder(order)


def _read(
    model: LanguageModel, input_ids: Tensor, state: Any, in_place: bool, attention_mask: Tensor | None
) -> tuple[Tensor, Any]:
    batch, tokens = input_ids.shape
    # An exported graph always returns the logits of every token.
    options: dict[str, Any] = {"logits_to_keep": 1} if isinstance(model, torch.nn.Module) else {}
    # Chunks of nearly equal length, so that a compiled model sees few different lengths.
    parts = -(-tokens // max(1, TOKENS_AT_ONCE // batch))
    masks = [None] * parts if attention_mask is None else attention_mask.tensor_split(parts, dim=1)
    for part, mask in zip(input_ids.tensor_split(parts, dim=1), masks, strict=True):
        if mask is not None:
            options["attention_mask"] = mask
        out = model(part, state, in_place=in_place and part.shape[1] == 1, **options)
        state, in_place = out.state, True
    return out.logits[:, -1], state


def taint(logits: Tensor) -> Tensor:
    """Return [B]: 0 for a row whose largest logit is finite, else NaN."""
    return 0 * logits.amax(dim=-1)


def check_finite(taint: Tensor) -> None:
    """Raise RuntimeError if an entry is NaN, naming the first such row. Synchronises with the device."""
    if math.isnan(float(taint.sum())):
        row = int(taint.isnan().nonzero()[0])
        raise RuntimeError(
            f"the largest logit of row {row} is NaN or infinite, so that no token can be chosen;"
            " look for NaN and infinity in the model's weights"
        )
