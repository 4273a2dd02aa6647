"""Blocks that decode one token on a CPU in one call of a kernel each (``lowering/tir/decode_layer.py``)."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from ramnet.model import Block
from ramnet.ops import registered


class DecodeBlock(Block):
    """A block that shares the modules of another; a batch, a gradient or another type than float32 goes to those."""

    def __init__(self, block: Block, kernels: str) -> None:
        nn.Module.__init__(self)
        self._modules, self.has_ffn, self.kernels = block._modules, block.has_ffn, kernels
        mixer, c = block.mixer, block.mixer.config
        self.sizes = (
            c.hidden_size, c.num_heads, c.order, c.sub_dim, c.top_k, c.slots, c.value_dim, c.intermediate_size
        )  # fmt: skip
        self.constants = {
            "decay_power": c.decay_power, "eps": c.eps, "temperature": c.temperature, "norm_eps": c.norm_eps,
            "cape_heads": mixer.cape_heads,
        }  # fmt: skip
        # Gathered once: looking them up in their modules at every token would cost more than the call.
        self.weights: tuple[Any, ...] = (
            block.mixer_norm.weight, block.mixer_norm.bias, mixer.log_scale, mixer.query_key_value.weight,
            mixer.output.weight,
        )  # fmt: skip
        if block.has_ffn:
            norm, ffn = block.ffn_norm, block.ffn
            self.weights += (norm.weight, norm.bias, ffn.gate_up.weight, ffn.down.weight)

    def forward(
        self, x: Tensor, memory: Tensor, mass: Tensor, position: Tensor, in_place: bool
    ) -> tuple[Tensor, Tensor, Tensor]:
        if in_place and x.shape[0] == 1 and not torch.is_grad_enabled():
            tensors = (memory, mass, *self.weights)
            if x.dtype == torch.float32 and all(t.dtype == torch.float32 and t.is_contiguous() for t in tensors):
                backend: Any = registered(self.kernels)
                return backend.decode_layer(x, position, tensors, self.sizes, self.constants), memory, mass
        return super().forward(x, memory, mass, position, in_place)
