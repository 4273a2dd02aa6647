"""Measures what int4 weights are calibrated by, the second moments of the inputs of each matrix product."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial

import torch
from torch import Tensor, nn

from ramnet import RamNetForCausalLM
from ramnet.ops import using

_PARAMETERS = 1 << 31  # of all windows together, so that a model of 340 million takes seconds
_FEWEST = 8


@torch.no_grad()
def moments(model: RamNetForCausalLM, windows: Sequence[Tensor]) -> dict[str, Tensor]:
    """Return the sum of x xᵀ over inputs x of each matrix, float32 [inputs, inputs], by the matrix's name.

    Args:
        windows: of text, ids int64 [length] each, of which a large model reads fewer.
    """
    found: dict[str, Tensor] = {}

    def add(name: str, layer: nn.Module, inputs: tuple[Tensor]) -> None:
        x = inputs[0].flatten(0, -2).float()
        found[name] = x.T @ x + found.get(name, 0)

    layers = {name: layer for name, layer in model.named_modules() if isinstance(layer, nn.Linear)}
    hooks = [layer.register_forward_pre_hook(partial(add, f"{name}.weight")) for name, layer in layers.items()]
    try:
        with using("cpu"):
            for ids in windows[: max(_FEWEST, _PARAMETERS // sum(p.numel() for p in model.parameters()))]:
                model(ids.unsqueeze(0))
    finally:
        for hook in hooks:
            hook.remove()
    return found
