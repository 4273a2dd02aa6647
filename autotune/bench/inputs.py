"""The inputs of the benchmark: fixed seeds, slots distinct within a token, weights of a product softmax."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from ramnet import ops


class ScanInputs(NamedTuple):
    """The tensor arguments of ``ramnet.ops.memory_scan``, in its order."""

    write_slots: Tensor  # [B, H, T, K]
    write_weights: Tensor  # [B, H, T, K]
    read_slots: Tensor  # [B, H, T, K]
    read_weights: Tensor  # [B, H, T, K]
    values: Tensor  # [B, H, T, D]
    memory: Tensor  # [B, H, M, D]
    mass: Tensor  # [B, H, M]

    def token(self, t: int) -> tuple[Tensor, ...]:
        """Return the arguments of ``memory_step`` for token t, without the state."""
        return tuple(x[:, :, t].contiguous() for x in self[:5])

    def requiring_grad(self) -> ScanInputs:
        """Return copies whose floating tensors require gradients."""
        return ScanInputs(*(x.detach().clone().requires_grad_(x.is_floating_point()) for x in self))


def scan_inputs(
    heads: int = 16, tokens: int = 1024, top_k: int = 8, order: int = 5, sub_dim: int = 4, value_dim: int = 64
) -> ScanInputs:
    """Return inputs with B = 1 and M = sub_dim^order. Slots are uniformly distributed, and the state is not zero."""
    generator = torch.Generator().manual_seed(0)
    slots = sub_dim**order
    shape = (1, heads, tokens)

    def access() -> tuple[Tensor, Tensor]:
        chosen = torch.rand(*shape, slots, generator=generator).topk(top_k, sorted=False).indices
        _, weights = ops.address_decode(decode_logits(heads * tokens, order, sub_dim, generator), top_k)
        return chosen.to(torch.int32), weights.view(*shape, top_k)

    (write_slots, write_weights), (read_slots, read_weights) = access(), access()
    return ScanInputs(
        write_slots, write_weights, read_slots, read_weights,
        values=torch.randn(*shape, value_dim, generator=generator),
        memory=torch.randn(1, heads, slots, value_dim, generator=generator),
        mass=torch.full((1, heads, slots), 1 / slots) + torch.rand(1, heads, slots, generator=generator),
    )  # fmt: skip


def decode_logits(rows: int, order: int, sub_dim: int, generator: torch.Generator | None = None) -> Tensor:
    """Return logits [rows, U, P] whose softmaxes are neither flat nor one-hot."""
    generator = generator or torch.Generator().manual_seed(0)
    return 2 * torch.randn(rows, order, sub_dim, generator=generator)
