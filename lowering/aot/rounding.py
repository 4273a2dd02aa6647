"""Roundings of weight matrices to integers."""

from __future__ import annotations

import torch
from torch import Tensor

# The inputs of a row that share a scale in int4. Integers are stored for a number of inputs that is a multiple of it.
GROUP = 32
# Numbers that are rounded at a time, so that temporaries stay in a core's cache: 3 times as fast as a whole matrix.
_AT_ONCE = 1 << 17
_TINY = torch.finfo(torch.float32).tiny


def int8(weight: Tensor) -> tuple[Tensor, Tensor]:
    """Round a matrix [outputs, inputs] to int8, symmetrically, with one float32 scale per output."""
    scale = weight.abs().amax(1) / 127
    whole = (weight / scale.clamp_min(_TINY).unsqueeze(1)).round()
    return whole.to(torch.int8), scale


def int4(weight: Tensor, moments: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """Round a matrix [outputs, inputs] to integers in -8..7 with one bfloat16 scale for each ``GROUP`` inputs of a row.

    The scale is that of the least squared error among seven that make the group's largest number -7 to -8.5. Integers
    are the nearest or, with moments, those of GPTQ (Frantar et al., 2022): the error of an input's weights is made up
    for by the weights of later inputs, as far as the inputs are correlated.

    Args:
        moments: float32 [inputs, inputs], the sum of x xᵀ over inputs x of the matrix on some text.

    Returns:
        packed: uint8 [outputs, inputs / 2]. The 16 bytes of a group hold its integers plus 8: those of the first 16
            inputs in the low four bits, those of the others in the high ones.
        scale: bfloat16 [outputs, inputs / 32], of either sign.
    """
    if moments is not None and weight.isfinite().all() and moments.isfinite().all():
        return _calibrated(weight, moments)
    found = []
    for rows in weight.split(max(1, _AT_ONCE // weight.shape[1])):
        groups = rows.unflatten(1, (-1, GROUP))
        scale = _scale(groups)
        found.append((_packed(_whole(groups, scale)), scale.squeeze(2).to(torch.bfloat16)))
    packed, scales = zip(*found, strict=True)
    return torch.cat(packed), torch.cat(scales)


def _calibrated(weight: Tensor, moments: Tensor) -> tuple[Tensor, Tensor]:
    inputs = len(moments)
    wide = moments.double()
    mean = wide.diagonal().mean().item()
    wide = wide + (0.01 * mean or 1.0) * torch.eye(inputs, dtype=torch.float64)
    # Row j: how an error of input j is spread over the later inputs, by the inverse of their moments.
    spread = torch.linalg.cholesky(torch.cholesky_inverse(torch.linalg.cholesky(wide)), upper=True)
    spread = (spread / spread.diagonal().unsqueeze(1)).float()
    left = weight.T.contiguous()  # [inputs, outputs], what is to be represented
    whole, error, scales = torch.empty_like(left), torch.empty(GROUP, len(weight)), []
    for first in range(0, inputs, GROUP):
        group, end = left[first : first + GROUP], first + GROUP
        scale = _scale(group.T.unsqueeze(1)).flatten()
        for j in range(GROUP):
            whole[first + j] = _whole(group[j], scale)
            error[j] = group[j] - whole[first + j] * scale
            group[j + 1 :] -= torch.outer(spread[first + j, first + j + 1 : end], error[j])
        left[end:] -= spread[first:end, end:].T @ error
        scales.append(scale.to(torch.bfloat16))
    return _packed(whole.T.contiguous().unflatten(1, (-1, GROUP))), torch.stack(scales, 1)


def _scale(groups: Tensor) -> Tensor:
    """Return the scale [outputs, groups, 1] of each group [outputs, groups, 32]."""
    largest = groups.gather(2, groups.abs().argmax(2, keepdim=True))
    scale, least = largest, torch.full_like(largest, torch.inf)
    for place in torch.linspace(7, 8.5, 7).tolist():
        tried = (largest / -place).to(torch.bfloat16).float()
        error = _whole(groups, tried).mul_(tried).sub_(groups).square_().sum(2, keepdim=True)
        # Nothing is less than NaN, so the scale of a group with NaN stays NaN.
        scale, least = torch.where(error < least, tried, scale), torch.minimum(error, least)
    return scale


def _packed(whole: Tensor) -> Tensor:
    low, high = (whole + 8).nan_to_num_().to(torch.uint8).chunk(2, 2)
    return (low | high << 4).flatten(1)


def unpacked(packed: Tensor) -> Tensor:
    """Return the integers [outputs, inputs] of ``int4``."""
    groups = packed.unflatten(1, (-1, GROUP // 2))
    return torch.cat([groups & 15, groups >> 4], 2).flatten(1).to(torch.int8) - 8


def _whole(groups: Tensor, scale: Tensor) -> Tensor:
    return (groups / torch.where(scale == 0, 1.0, scale)).round_().clamp_(-8, 7)
