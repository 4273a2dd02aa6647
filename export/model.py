"""The model that is exported, in the form that every format starts from."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import nn

from lowering import plain
from lowering.aot import weights
from ramnet import RamNetForCausalLM


def uncompiled(model: RamNetForCausalLM) -> RamNetForCausalLM:
    """Return the model that ``lowering.compile`` or ``torch.compile`` was given."""
    return plain(getattr(model, "_orig_mod", model))  # torch.compile's wrapper has the model


def float32(model: RamNetForCausalLM) -> RamNetForCausalLM:
    """Return the model in float32 on the CPU, uncompiled: the model itself if it is that."""
    model = uncompiled(model)
    if all(p.dtype == torch.float32 and p.device.type == "cpu" for p in model.parameters()):
        return model
    return copy.deepcopy(model).to("cpu", torch.float32)


def as_stored(model: RamNetForCausalLM, stored: dict[str, torch.Tensor], precision: str) -> RamNetForCausalLM:
    """Return a float32 model with the weights rounded as ``weights.stored`` gave them."""
    return RamNetForCausalLM.of(model.config, weights.restored(stored, model.config, precision)).eval()


@contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """The model in evaluation mode within the block; each module is then in the mode it was in."""
    modes = [(module, module.training) for module in model.modules()]
    model.eval()
    try:
        yield
    finally:
        for module, mode in modes:
            module.training = mode
