"""Decodes one token of a block on a CPU in a single kernel (``lowering/cpu/decode_layer.py``)."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from lowering.model.untouched import has_global_hooks, is_plain, untouched, untouched_linear
from ramnet.blocks import Block, SwiGLU
from ramnet.layer import RamLayer
from ramnet.ops import registered


def decode(block: nn.Module, x: Tensor, memory: Tensor, mass: Tensor, position: Tensor, kernels: str) -> Tensor | None:
    """Run ``block`` on one token x [1, 1, C], updating its state in place. Returns y [1, 1, C].

    Returns None, without doing so, if B > 1, gradients are enabled, a tensor is not float32, or the block was changed.
    """
    if x.shape[0] != 1 or torch.is_grad_enabled() or has_global_hooks():
        return None
    weights = _weights(block)
    if weights is None or not all(is_plain(tensor, torch.float32) for tensor in (x, memory, mass, *weights)):
        return None
    mixer: Any = block._modules["mixer"]
    c: Any = block.config
    sizes = (c.hidden_size, c.num_heads, c.order, c.sub_dim, c.top_k, c.slots, c.value_dim, c.intermediate_size)
    constants = {
        "decay_power": c.decay_power, "eps": c.eps, "temperature": c.temperature, "norm_eps": c.norm_eps,
        "cape_heads": mixer.cape_heads,
    }  # fmt: skip
    backend: Any = registered(kernels)
    return backend.decode_layer(x, position.to(torch.int64).view(()), (memory, mass, *weights), sizes, constants)


def _weights(block: nn.Module) -> tuple[Any, ...] | None:
    """Return the kernel's weights, or None if the block was changed. They are looked up anew at each token."""
    if not untouched(block, Block):
        return None
    parts = block._modules
    mixer: Any = parts["mixer"]
    if not untouched(mixer, RamLayer):
        return None
    config: Any = block.config
    eps = config.norm_eps
    project, output = (untouched_linear(mixer._modules[name]) for name in ("query_key_value", "output"))
    weights: tuple[Any, ...] = (*_norm(parts["mixer_norm"], eps), mixer._parameters["log_scale"], project, output)
    if config.intermediate_size:
        ffn: Any = parts["ffn"]
        if not untouched(ffn, SwiGLU):
            return None
        gate_up, down = (untouched_linear(ffn._modules[name]) for name in ("gate_up", "down"))
        weights += (*_norm(parts["ffn_norm"], eps), gate_up, down)
    return None if any(weight is None for weight in weights) else weights


def _norm(norm: Any, eps: float) -> tuple[Tensor | None, Tensor | None]:
    """Return gain and bias of an untouched LayerNorm with this ``eps``, else None twice."""
    if not untouched(norm, nn.LayerNorm) or norm.eps != eps:
        return None, None
    return norm._parameters["weight"], norm._parameters["bias"]
