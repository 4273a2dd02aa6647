"""The blocks of the RAM-Net language model, each called with the part of the state that it updates."""

from __future__ import annotations

from typing import Protocol

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ramnet.config import RamNetConfig
from ramnet.layer import ModelsState, RamLayer
from ramnet.sequences import Sequences
from ramnet.state import RamState


class Sizes(Protocol):
    """The part of a configuration that determines a feed-forward network and a convolution block."""

    @property
    def hidden_size(self) -> int: ...

    @property
    def intermediate_size(self) -> int: ...

    @property
    def conv_kernel(self) -> int: ...

    @property
    def norm_eps(self) -> float: ...


class SwiGLU(nn.Module):
    """The gated feed-forward network, down(silu(gate(x)) · up(x)), of width ``intermediate_size``."""

    def __init__(self, config: Sizes) -> None:
        super().__init__()
        self.gate_up = nn.Linear(config.hidden_size, 2 * config.intermediate_size, bias=False)
        self.down = nn.Linear(config.intermediate_size, config.hidden_size, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        gate, up = self.gate_up(x).chunk(2, dim=-1)
        return self.down(F.silu(gate) * up)


class Block(nn.Module):
    """x + RAM(LayerNorm(x)), then x + FFN(LayerNorm(x)) (paper, step 8)."""

    def __init__(self, config: RamNetConfig, layer: int) -> None:
        super().__init__()
        self.config = config
        self.mixer_norm = nn.LayerNorm(config.hidden_size, eps=config.norm_eps)
        fields = config.layers[layer].model_dump()
        self.mixer = RamLayer(**fields, cape_heads=config.cape_heads(layer))
        self.has_ffn = config.intermediate_size > 0
        if self.has_ffn:
            self.ffn_norm = nn.LayerNorm(config.hidden_size, eps=config.norm_eps)
            self.ffn = SwiGLU(config)

    def forward(
        self,
        x: Tensor,
        memory: Tensor,
        mass: Tensor,
        position: Tensor,
        in_place: bool,
        sequences: Sequences | None = None,
    ) -> tuple[Tensor, Tensor, Tensor]:
        state: RamState = ModelsState([memory], [mass], [], position)
        mixed, state = self.mixer(self.mixer_norm(x), state, in_place=in_place, sequences=sequences)
        x = x + mixed
        if self.has_ffn:
            x = x + self.ffn(self.ffn_norm(x))
        return x, state.memory[0], state.mass[0]


class GatedConvBlock(nn.Module):
    """x + h + conv(h) · gate(h) with h = LayerNorm(x), where conv is a short causal depthwise convolution.

    The baselines of the recall experiment have one before the layers under test; the paper's language model has none.
    """

    def __init__(self, config: Sizes) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(config.hidden_size, eps=config.norm_eps)
        self.gate = nn.Linear(config.hidden_size, config.hidden_size)
        self.taps = nn.Parameter(torch.empty(config.conv_kernel, config.hidden_size))
        self.reset_parameters()

    @torch.no_grad()
    def reset_parameters(self) -> None:
        """Draw the taps; the gate and the norm are torch's own modules, which have this method."""
        self.taps.copy_(torch.randn_like(self.taps) / len(self.taps) ** 0.5)

    def forward(self, x: Tensor, recent: Tensor, sequences: Sequences | None = None) -> tuple[Tensor, Tensor]:
        h = self.norm(x)
        tokens, kept = h.shape[1], recent.shape[1]
        if sequences is not None:
            seen = torch.cat([recent.to(h.dtype).flatten(0, 1), h.flatten(0, 1)])  # [R·(kernel − 1) + B·T, C]
            lags = range(-kept, 1)
            before = (sequences.places(sequences.row, sequences.offset + lag, kept) for lag in lags)
            conv = sum(tap * seen[place] for tap, place in zip(self.taps, before, strict=True))
            end = sequences.lengths.unsqueeze(1) + torch.arange(-kept, 0, device=x.device)
            last = seen[sequences.places(torch.arange(len(end), device=x.device).unsqueeze(1), end, kept)]
        else:
            seen = torch.cat([recent.to(h.dtype), h], dim=1)  # [B, kernel − 1 + T, C]
            last = seen[:, tokens:]
            if tokens == 1:  # these two operations take 7 µs, the dozen below 45 µs
                conv = (self.taps * seen).sum(1, keepdim=True)
            else:
                conv = sum(tap * seen[:, i : i + tokens] for i, tap in enumerate(self.taps))
        # A view would keep the whole sequence in memory for as long as the state lives.
        recent = last.to(recent.dtype, copy=True, memory_format=torch.contiguous_format)
        return x + h + conv * self.gate(h), recent
