"""A model's logits after some tokens, with memory that does not grow with how many they are."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor

from ramnet.config import RamNetConfig

# Of a prompt, the whole batch counted. Measured for "340m" in float32 on a CPU: 175 MB of activations, where 16 384
# tokens at once take 1.05 GB, and no slower.
TOKENS_AT_ONCE = 2048


class LanguageModel(Protocol):
    """What ``generate`` asks of a model: ``RamNetForCausalLM`` and ``export``'s ``OnnxSession`` have it."""

    @property
    def config(self) -> RamNetConfig: ...

    def __call__(self, input_ids: Tensor, state: Any = None, *, in_place: bool = False) -> Any: ...


@dataclass(frozen=True)
class Said:
    """What a model said in each row.

    Attributes:
        tokens: int64 [B, n]; a row that stopped repeats its last token.
        lengths: int64 [B], how many of them the row said before it stopped, its stop included.
        state: after the prompt and all of ``tokens``, where it was asked for.
    """

    tokens: Tensor
    lengths: Tensor
    state: Any


def read(
    model: LanguageModel, input_ids: Tensor, state: Any, in_place: bool, attention_mask: Tensor | None = None
) -> tuple[Tensor, Any]:
    """The logits [B, V] after the last of ``input_ids`` [B, T], T ≥ 1, and the state there.

    Args:
        in_place: ``state`` may be updated in place; it is left as it was otherwise.
        attention_mask: [B, T], 0 for padding, of a model that takes one.
    """
    batch, tokens = input_ids.shape
    # An exported graph gives the logits of every token.
    options: dict[str, Any] = {"logits_to_keep": 1} if isinstance(model, torch.nn.Module) else {}
    # Parts of nearly one length, so that a compiled model sees few lengths.
    parts = -(-tokens // max(1, TOKENS_AT_ONCE // batch))
    masks = [None] * parts if attention_mask is None else attention_mask.tensor_split(parts, dim=1)
    for part, mask in zip(input_ids.tensor_split(parts, dim=1), masks, strict=True):
        if mask is not None:
            options["attention_mask"] = mask
        out = model(part, state, in_place=in_place and part.shape[1] == 1, **options)
        state, in_place = out.state, True
    return out.logits[:, -1], state


def taint(logits: Tensor) -> Tensor:
    """[B]: 0 where the largest logit of a row is finite, else NaN."""
    return 0 * logits.amax(dim=-1)


def check_finite(taint: Tensor) -> None:
    """RuntimeError, naming the first row, where a number is NaN; waits for the device."""
    if math.isnan(float(taint.sum())):
        row = int(taint.isnan().nonzero()[0])
        raise RuntimeError(
            f"the largest logit of row {row} is NaN or infinite, so that no token can be chosen;"
            " look for NaN and infinity in the model's weights"
        )
