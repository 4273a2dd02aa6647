"""One token of a layer between its projections in eager PyTorch, which ``GpuKernels.decode_heads`` is compared with."""

from __future__ import annotations

from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor

from lowering.gpu.decode_heads.options import MixerOptions
from ramnet import ops
from ramnet.ops import reference
from ramnet.ops.accesses import Accesses

# The weight of the K+1st address must be below this fraction of the K-th, or rounding could exchange them.
LARGEST_RATIO = 0.98


def decode_heads(
    projected: Tensor, log_scale: Tensor, position: Tensor, memory: Tensor, mass: Tensor, options: MixerOptions
) -> Tensor:
    """Shapes as in ``lowering.gpu.backend.GpuKernels.decode_heads``; ``memory`` and ``mass`` are updated in place."""
    batch, heads, slots, dim = memory.shape
    order, sub_dim, top_k, cape_heads, temperature, decay_power, eps = options
    address, values = projected.split([2 * heads * order * sub_dim, heads * dim], dim=-1)
    logits = address.view(batch, 2, heads, order, sub_dim)
    where, weights = reference.address_decode(_scaled(logits, log_scale, temperature), top_k)  # [B, 2, H, K]
    uses_cape = torch.arange(heads, device=where.device) < cape_heads
    where = ops.cyclic_shift(where, (position.unsqueeze(1) * uses_cape).view(batch, 1, heads, 1), slots)
    accesses = Accesses(where[:, 1], weights[:, 1], where[:, 0], weights[:, 0])
    return reference.memory_step(accesses, values.view(batch, heads, dim), memory, mass, decay_power, eps).flatten(1)


def separated(draw: Callable[[], Tensor], log_scale: Tensor, top_k: int) -> Tensor:
    """Draw logits [B, 2, H, U, P] whose K-th address has a clearly larger weight than the next.

    In narrow dtypes, two sums of logits are often equal, and either address would be right.
    """
    logits = draw()
    if top_k == logits.shape[-1] ** logits.shape[-2]:
        return logits
    while True:
        _, weights = reference.address_decode(_scaled(logits, log_scale, 1.0), top_k + 1)
        close = weights[..., -1] > LARGEST_RATIO * weights[..., -2]
        if not close.any():
            return logits
        logits = torch.where(close[..., None, None], draw(), logits)


def _scaled(logits: Tensor, log_scale: Tensor, temperature: float) -> Tensor:
    """Multiply logits by exp(α)/τ in float32 or wider."""
    dtype = torch.promote_types(logits.dtype, torch.float32)
    return logits.to(dtype) * (log_scale.to(dtype).exp() / temperature)[..., None, None]


# The reference's ops, and that one.
EAGER: Any = SimpleNamespace(
    address_decode=reference.address_decode,
    address_decode_backward=reference.address_decode_backward,
    memory_scan=reference.memory_scan,
    memory_scan_backward=reference.memory_scan_backward,
    memory_step=reference.memory_step,
    decode_heads=decode_heads,
)
