"""Checks of token ids."""

from __future__ import annotations

import torch
from torch import Tensor


def check_type(ids: Tensor, name: str = "input_ids") -> None:
    """Raise TypeError if ``ids`` is not a tensor of int64 or int32."""
    if not isinstance(ids, Tensor):
        raise TypeError(f"{name} is a {type(ids).__name__}; it must be a tensor of torch.int64")
    if ids.dtype not in (torch.int64, torch.int32):
        raise TypeError(f"{name} is {ids.dtype}; it must be torch.int64")


def check_range(ids: Tensor, vocab_size: int, name: str = "input_ids") -> None:
    """Raise ValueError if an id is outside 0..vocab_size-1. Synchronises with the device."""
    low, high = int(ids.min()), int(ids.max())
    if low < 0 or high >= vocab_size:
        raise ValueError(f"{name} holds {low if low < 0 else high}; token ids must be in 0..{vocab_size - 1}")


def check_prompt(input_ids: Tensor, vocab_size: int, function: str = "generate") -> None:
    """Raise ValueError unless ``input_ids`` is [B, T] with B and T ≥ 1, within the vocabulary; TypeError as above."""
    check_type(input_ids)
    if input_ids.dim() != 2 or input_ids.numel() < 1:
        raise ValueError(f"input_ids has shape {list(input_ids.shape)}; {function} needs [B, T] with B and T >= 1")
    check_range(input_ids, vocab_size)
