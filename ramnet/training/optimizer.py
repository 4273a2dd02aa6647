"""The optimizer, and which parameters its weight decay applies to."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from ramnet.blocks import GatedConvBlock
from ramnet.training.recipe import Recipe


def adamw(model: nn.Module, recipe: Recipe) -> torch.optim.AdamW:
    """Return AdamW for the parameters of ``model``, in the groups of ``groups``."""
    return torch.optim.AdamW(
        groups(model, recipe.weight_decay), lr=recipe.learning_rate, betas=(recipe.beta1, recipe.beta2), fused=True
    )


def groups(model: nn.Module, weight_decay: float) -> list[dict[str, Any]]:
    """Return two groups of parameters: those that decay, and those that do not.

    The matrices of linear layers and the taps of convolutions decay. Embeddings do not, nor the head that is tied to
    one, nor norms, biases, the log-scales α, address biases and the other vectors of a mixer.
    """
    kept = {id(module.weight) for module in model.modules() if isinstance(module, nn.Embedding)}
    decaying = [module.weight for module in model.modules() if isinstance(module, nn.Linear)]
    decaying += [module.taps for module in model.modules() if isinstance(module, GatedConvBlock)]
    chosen = {id(parameter) for parameter in decaying} - kept
    sides: tuple[list[nn.Parameter], list[nn.Parameter]] = ([], [])
    for parameter in model.parameters():
        sides[id(parameter) not in chosen].append(parameter)
    return [{"params": sides[0], "weight_decay": weight_decay}, {"params": sides[1], "weight_decay": 0.0}]
