"""The memory ops in operators that ExecuTorch has, for the export of one token."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode


class PlainOperators(TorchFunctionMode):
    """Within this mode, a model's token is computed without custom ops.

    Args:
        flat: the memory [H·M, D] or mass [H·M] by the id of the view of it, [1, H, M, D] or [1, H, M], that the model
            is called with. ExecuTorch writes single rows in place only where the index is the first dimension, and
            would copy the whole memory at every token if the rows were written through a view.
    """

    def __init__(self, flat: dict[int, Tensor]) -> None:
        super().__init__()
        self._flat = flat

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        plain = {
            torch.ops.ramnet.address_decode.default: address_decode,
            torch.ops.ramnet.memory_step.default: self._memory_step,
            torch.remainder: _remainder,
        }
        return plain.get(func, func)(*args, **(kwargs or {}))

    def _memory_step(  # noqa: PLR0913 - the signature of its op
        self, write_slots: Tensor, write_weights: Tensor, read_slots: Tensor, read_weights: Tensor, values: Tensor,
        memory: Tensor, mass: Tensor, decay_power: float, eps: float, kernels: str,
    ) -> Tensor:  # fmt: skip
        """Write, then read (paper, steps 5 and 6), for one row."""
        _, heads, num_slots, value_dim = memory.shape
        memory, mass = self._flat[id(memory)], self._flat[id(mass)]
        first = num_slots * torch.arange(heads).view(1, heads, 1)
        write_at, read_at = ((slots + first).flatten() for slots in (write_slots, read_slots))
        decay = (1 - write_weights) if decay_power == 1 else (1 - write_weights) ** decay_power
        added = write_weights.unsqueeze(-1) * values.unsqueeze(2)  # [1, H, K, D]
        rows = decay.view(-1, 1) * memory.index_select(0, write_at) + added.view(-1, value_dim)
        memory.index_put_((write_at,), rows)
        mass.index_put_((write_at,), decay.flatten() * mass.index_select(0, write_at) + write_weights.flatten())
        scaled = read_weights / (mass.index_select(0, read_at).view_as(read_weights) + eps)
        return (scaled.unsqueeze(2) @ memory.index_select(0, read_at).view(1, heads, -1, value_dim)).squeeze(2)


def address_decode(logits: Tensor, top_k: int, kernels: str = "") -> tuple[Tensor, Tensor]:
    """Return weights and slots [..., K] of logits [..., U, P] by beam search, with one topk per sub-vector."""
    order, sub_dim = logits.shape[-2:]
    log_p = logits.log_softmax(dim=-1)
    digits = torch.arange(sub_dim)
    best, slots = log_p[..., 0, :], digits.expand(log_p[..., 0, :].shape)
    for u in range(order):
        if u > 0:
            best = (best.unsqueeze(-1) + log_p[..., u, :].unsqueeze(-2)).flatten(-2)
            slots = (slots.unsqueeze(-1) + digits * sub_dim**u).flatten(-2)
        best, chosen = best.topk(min(top_k, best.shape[-1]), dim=-1)
        slots = slots.gather(-1, chosen)
    return best.exp(), slots.to(torch.int32)


def _remainder(x: Tensor, modulus: int) -> Tensor:
    """Return x mod ``modulus``, never negative: ExecuTorch's integer remainder has the sign of ``x``, as in C."""
    return torch.remainder(torch.remainder(x, modulus) + modulus, modulus)
