"""Token ids, checked where they enter."""

from __future__ import annotations

import torch
from torch import Tensor


def check_type(input_ids: Tensor) -> None:
    """TypeError for ids that are not integers."""
    if input_ids.dtype not in (torch.int64, torch.int32):
        raise TypeError(f"input_ids is {input_ids.dtype}; it must be torch.int64")


def check_range(input_ids: Tensor, vocab_size: int) -> None:
    """ValueError, naming the id, where one is outside the vocabulary; waits for the device."""
    low, high = int(input_ids.min()), int(input_ids.max())
    if low < 0 or high >= vocab_size:
        raise ValueError(f"input_ids holds {low if low < 0 else high}; token ids must be in 0..{vocab_size - 1}")
