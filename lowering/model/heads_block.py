"""Blocks that decode a token on a GPU, all between two projections in one launch (``GpuKernels.decode_heads``).

The products with weights stay torch's, whatever the batch.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from lowering.model.untouched import untouched
from ramnet.layer import RamLayer
from ramnet.model import Block
from ramnet.ops import registered

# By schema, for the reason that ramnet/ops/library.py gives at memory_step.
_LIBRARY = torch.library.Library("ramnet", "FRAGMENT")
_LIBRARY.define(
    "decode_heads(Tensor projected, Tensor log_scale, Tensor position, Tensor(a!) memory, Tensor(b!) mass, int order,"
    " int sub_dim, int top_k, int cape_heads, float temperature, float decay_power, float eps, str kernels) -> Tensor"
)


def _decode_heads(
    projected: Tensor, log_scale: Tensor, position: Tensor, memory: Tensor, mass: Tensor, order: int, sub_dim: int,
    top_k: int, cape_heads: int, temperature: float, decay_power: float, eps: float, kernels: str,
) -> Tensor:  # fmt: skip
    return registered(kernels).decode_heads(  # type: ignore[attr-defined]
        projected, log_scale, position, memory, mass, order, sub_dim, top_k, cape_heads, temperature, decay_power, eps
    )


_LIBRARY.impl("decode_heads", _decode_heads, "CompositeExplicitAutograd")


@torch.library.register_fake("ramnet::decode_heads")
def _(
    projected: Tensor, log_scale: Tensor, position: Tensor, memory: Tensor, mass: Tensor, order: int, sub_dim: int,
    top_k: int, cape_heads: int, temperature: float, decay_power: float, eps: float, kernels: str,
) -> Tensor:  # fmt: skip
    return projected.new_empty(projected.shape[0], memory.shape[1] * memory.shape[3])


def serves(block: Any, memory: Tensor, mass: Tensor) -> bool:
    """Whether ``decode`` can stand for the block: as it was made, with a state in one piece, and without gradients."""
    return (
        memory.is_contiguous()
        and mass.is_contiguous()
        and not torch.is_grad_enabled()
        and untouched(block, Block)
        and untouched(block.mixer, RamLayer)
    )


def decode(block: Any, x: Tensor, memory: Tensor, mass: Tensor, position: Tensor, kernels: str) -> Tensor:
    """What ``block`` makes of one token of each sequence, x [B, 1, C], its state updated in place.

    The layers within are called as the modules they are.
    """
    mixer, c = block.mixer, block.mixer.config
    projected = mixer.query_key_value(block.mixer_norm(x)).flatten(1)  # [B, 2·H·U·P + H·D]
    out = torch.ops.ramnet.decode_heads(
        projected, mixer.log_scale, position, memory, mass, c.order, c.sub_dim, c.top_k, mixer.cape_heads,
        c.temperature, c.decay_power, c.eps, kernels,
    )  # fmt: skip
    x = x + mixer.output(out).unsqueeze(1)
    return x + block.ffn(block.ffn_norm(x)) if block.has_ffn else x
