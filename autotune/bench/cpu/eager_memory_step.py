"""``memory_step`` in eager PyTorch, and a loop over the tokens of a sequence."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from autotune.bench.inputs import ScanInputs
from autotune.measure.eager_scan import flat_slots


def by_slots(
    write_slots: Tensor, write_weights: Tensor, read_slots: Tensor, read_weights: Tensor,
    values: Tensor, memory: Tensor, mass: Tensor,
) -> Tensor:  # fmt: skip
    """The paper's formulas at γ = 1, a loop over slots."""
    b, h = torch.meshgrid(*(torch.arange(n) for n in memory.shape[:2]), indexing="ij")
    output = torch.zeros_like(values)
    for k in range(write_slots.shape[2]):
        slot, w = write_slots[:, :, k].long(), write_weights[:, :, k]
        memory[b, h, slot] = (1 - w).unsqueeze(-1) * memory[b, h, slot] + w.unsqueeze(-1) * values
        mass[b, h, slot] = (1 - w) * mass[b, h, slot] + w
    for k in range(read_slots.shape[2]):
        slot, r = read_slots[:, :, k].long(), read_weights[:, :, k]
        output += (r / (mass[b, h, slot] + 1e-6)).unsqueeze(-1) * memory[b, h, slot]
    return output


def in_place(
    write_slots: Tensor, write_weights: Tensor, read_slots: Tensor, read_weights: Tensor,
    values: Tensor, memory: Tensor, mass: Tensor,
) -> Tensor:  # fmt: skip
    """index_select and index_copy_ on the flat state and the mass, γ = 1."""
    write_at = flat_slots(write_slots.unsqueeze(2), memory)[0]
    read_at = flat_slots(read_slots.unsqueeze(2), memory)[0]
    state, z = memory.view(-1, memory.shape[-1]), mass.view(-1)
    w, r = write_weights.flatten(), read_weights.flatten()
    written = (write_weights.unsqueeze(-1) * values.unsqueeze(2)).view(-1, values.shape[-1])  # [N·K, D]
    state.index_copy_(0, write_at, torch.addcmul(written, (1 - w).unsqueeze(-1), state.index_select(0, write_at)))
    z.index_copy_(0, write_at, torch.addcmul(w, 1 - w, z.index_select(0, write_at)))
    scaled = (r / (z.index_select(0, read_at) + 1e-6)).view(-1, 1, read_slots.shape[2])
    rows = state.index_select(0, read_at).view(scaled.shape[0], scaled.shape[2], -1)
    return torch.bmm(scaled, rows).view(values.shape)


def one_gather(
    write_slots: Tensor, write_weights: Tensor, read_slots: Tensor, read_weights: Tensor,
    values: Tensor, state: Tensor, first_row: Tensor,
) -> Tensor:  # fmt: skip
    """As ``in_place``, but the mass is a column of the state [N·M, D + 1]; ``first_row`` is [N, 1]."""
    write_at = (write_slots.flatten(0, 1) + first_row).flatten()
    read_at = (read_slots.flatten(0, 1) + first_row).flatten()
    w = write_weights.view(-1, 1)
    extended = torch.nn.functional.pad(values, (0, 1), value=1.0)
    written = (write_weights.unsqueeze(-1) * extended.unsqueeze(2)).view(-1, state.shape[1])  # [N·K, D + 1]
    state.index_copy_(0, write_at, torch.addcmul(written, 1 - w, state.index_select(0, write_at)))
    seen = state.index_select(0, read_at).view(first_row.shape[0], -1, state.shape[1])  # [N, K, D + 1]
    scaled = read_weights.flatten(0, 1) / (seen[..., -1] + 1e-6)
    return torch.bmm(scaled.unsqueeze(1), seen[..., :-1]).view(values.shape)


class Steps:
    """A call runs all tokens of a sequence one by one, on a state that is kept between calls."""

    def __init__(self, inputs: ScanInputs, one: Callable[..., Tensor], state: tuple[Any, ...] | None = None) -> None:
        self.tokens = [inputs.token(t) for t in range(inputs.values.shape[2])]
        self.one = one
        self.state = state or (inputs.memory.clone(), inputs.mass.clone())

    def __call__(self) -> None:
        for token in self.tokens:
            self.one(*token, *self.state)

    def outputs(self) -> Tensor:
        """The outputs [B, H, T, D] of the tokens; those of the scan when nothing was called before."""
        return torch.stack([self.one(*token, *self.state) for token in self.tokens], 2)


def beside_mass(inputs: ScanInputs) -> tuple[Tensor, Tensor]:
    """The state that ``one_gather`` takes."""
    state = torch.cat([inputs.memory, inputs.mass.unsqueeze(-1)], -1).flatten(0, 2)
    return state, torch.arange(0, state.shape[0], inputs.memory.shape[2]).unsqueeze(1)
