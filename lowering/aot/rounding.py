"""Roundings of weight matrices to integers."""

from __future__ import annotations

import torch
from torch import Tensor

# The inputs of a row that share a scale in int4. Integers are stored for a number of inputs that is a multiple of it.
GROUP = 32
_TINY = torch.finfo(torch.float32).tiny


def int8(weight: Tensor) -> tuple[Tensor, Tensor]:
    """Round a matrix [outputs, inputs] to int8, symmetrically, with one float32 scale per output."""
    scale = weight.abs().amax(1) / 127
    whole = (weight / scale.clamp_min(_TINY).unsqueeze(1)).round()
    return whole.to(torch.int8), scale


def int4(weight: Tensor) -> tuple[Tensor, Tensor]:
    """Round a matrix [outputs, inputs] to integers in -8..7 with one bfloat16 scale for each ``GROUP`` inputs of a row.

    The scale is that of the least squared error among seven that make the group's largest number -7 to -8.5.

    Returns:
        packed: uint8 [outputs, inputs / 2]. The 16 bytes of a group hold its integers plus 8: those of the first 16
            inputs in the low four bits, those of the others in the high ones.
        scale: bfloat16 [outputs, inputs / 32], of either sign.
    """
    groups = weight.unflatten(1, (-1, GROUP))
    largest = groups.gather(2, groups.abs().argmax(2, keepdim=True))
    scale, least = largest, torch.full_like(largest, torch.inf)
    for place in torch.linspace(7, 8.5, 7).tolist():
        tried = (largest / -place).to(torch.bfloat16).float()
        error = (_whole(groups, tried) * tried - groups).square().sum(2, keepdim=True)
        # Nothing is less than NaN, so the scale of a group with NaN stays NaN.
        scale, least = torch.where(error < least, tried, scale), torch.minimum(error, least)
    low, high = (_whole(groups, scale) + 8).nan_to_num().to(torch.uint8).chunk(2, 2)
    return (low | high << 4).flatten(1), scale.squeeze(2).to(torch.bfloat16)


def unpacked(packed: Tensor) -> Tensor:
    """Return the integers [outputs, inputs] of ``int4``."""
    groups = packed.unflatten(1, (-1, GROUP // 2))
    return torch.cat([groups & 15, groups >> 4], 2).flatten(1).to(torch.int8) - 8


def _whole(groups: Tensor, scale: Tensor) -> Tensor:
    return (groups / torch.where(scale == 0, 1.0, scale)).round().clamp(-8, 7)
