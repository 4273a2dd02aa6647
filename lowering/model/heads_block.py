"""Decodes one token of a block on a GPU. All between the two projections is one kernel (``GpuKernels.decode_heads``);
matrix products with weights are torch's."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd.graph import increment_version

from lowering.gpu.decode_heads.options import MixerOptions
from lowering.model.untouched import untouched
from ramnet.blocks import Block
from ramnet.layer import RamLayer
from ramnet.ops import registered

# Defined by its schema for speed; see memory_step in ramnet/ops/library.py.
_LIBRARY = torch.library.Library("ramnet", "FRAGMENT")
_LIBRARY.define(
    "decode_heads(Tensor projected, Tensor log_scale, Tensor position, Tensor(a!) memory, Tensor(b!) mass, int order,"
    " int sub_dim, int top_k, int cape_heads, float temperature, float decay_power, float eps, str kernels) -> Tensor"
)


def _decode_heads(
    projected: Tensor, log_scale: Tensor, position: Tensor, memory: Tensor, mass: Tensor, *others: Any
) -> Tensor:
    *options, kernels = others  # as in the schema
    output: Tensor = registered(kernels).decode_heads(  # type: ignore[attr-defined]
        projected, log_scale, position, memory, mass, MixerOptions(*options)
    )
    increment_version((memory, mass))  # as in ramnet/ops/library.py
    return output


_LIBRARY.impl("decode_heads", _decode_heads, "CompositeExplicitAutograd")


@torch.library.register_fake("ramnet::decode_heads")
def _(projected: Tensor, log_scale: Tensor, position: Tensor, memory: Tensor, *others: Any) -> Tensor:
    return projected.new_empty(projected.shape[0], memory.shape[1] * memory.shape[3])


def serves(block: Any, memory: Tensor, mass: Tensor) -> bool:
    """Return whether ``decode`` can replace the block: unchanged, with a contiguous state and gradients disabled."""
    return (
        memory.is_contiguous()
        and mass.is_contiguous()
        and not torch.is_grad_enabled()
        and untouched(block, Block)
        and untouched(block.mixer, RamLayer)
    )


def decode(block: Any, x: Tensor, memory: Tensor, mass: Tensor, position: Tensor, kernels: str) -> Tensor:
    """Run ``block`` on one token of each row, x [B, 1, C], updating its state in place. Returns y [B, 1, C].

    The block's norms and linear layers are called as modules.
    """
    mixer, c = block.mixer, block.mixer.config
    projected = mixer.query_key_value(block.mixer_norm(x)).flatten(1)  # [B, 2·H·U·P + H·D]
    if mixer.address_bias is not None:
        bias = mixer.address_bias.flatten()
        projected[:, : len(bias)] += bias
    out = torch.ops.ramnet.decode_heads(
        projected, mixer.log_scale, position, memory, mass, c.order, c.sub_dim, c.top_k, mixer.cape_heads,
        c.temperature, c.decay_power, c.eps, kernels,
    )  # fmt: skip
    x = x + mixer.output(out).unsqueeze(1)
    return x + block.ffn(block.ffn_norm(x)) if block.has_ffn else x
