"""Inputs of decode_heads, and the paper's steps on them by vectors over all M slots."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from tests.brute_force import keep_largest, pdma, product_softmax

POWER, EPS, TEMPERATURE = 1.3, 1e-4, 0.7


class Sizes(NamedTuple):
    batch: int
    heads: int
    order: int
    sub_dim: int
    top_k: int
    width: int


def random_inputs(sizes: Sizes, dtype: torch.dtype, state_dtype: torch.dtype, position: int = 0) -> dict[str, Tensor]:
    """The tensors of ``GpuKernels.decode_heads``."""
    batch, heads, order, sub_dim, _, width = sizes
    slots = sub_dim**order
    generator = torch.Generator().manual_seed(0)

    def normal(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator)

    return {
        "projected": (2 * normal(batch, 2 * heads * order * sub_dim + heads * width)).to(dtype),
        "log_scale": (0.3 * normal(2, heads)).to(dtype),
        "position": position + 2 * torch.arange(batch),  # every row has another position
        "memory": normal(batch, heads, slots, width).to(state_dtype),
        "mass": (0.1 + normal(batch, heads, slots).abs()).to(state_dtype),
    }


def expected(inputs: dict[str, Tensor], sizes: Sizes, cape_heads: int) -> tuple[Tensor, Tensor, Tensor]:
    """Output [B, H·D], memory and mass, float64, by vectors over all M slots."""
    batch, heads, order, sub_dim, top_k, width = sizes
    exact = {name: x.cpu().double() for name, x in inputs.items()}
    logits, values = exact["projected"].split([2 * heads * order * sub_dim, heads * width], dim=-1)
    logits = logits.view(batch, 2, heads, order, sub_dim) * (exact["log_scale"].exp() / TEMPERATURE)[..., None, None]
    address = keep_largest(product_softmax(logits), top_k)
    rows = zip(address, inputs["position"].tolist(), strict=True)
    shifted = torch.stack([row.roll(-position, dims=-1) for row, position in rows])  # [P_t(a)]_i = a_((i+t) mod M)
    with_cape = (torch.arange(heads) < cape_heads)[:, None]
    read, write = torch.where(with_cape, shifted, address).unsqueeze(-2).unbind(1)
    output, memory, mass = pdma(
        write, read, values.view(batch, heads, 1, width), exact["memory"], exact["mass"], POWER, EPS, 0.01
    )
    return output.flatten(1), memory, mass
