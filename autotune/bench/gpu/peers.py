"""RAM-Net's model with mixers of other models: the same width, layers, norms, feed-forward networks and head."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from autotune.bench.gpu.run import require_fla
from ramnet import RamNetConfig, RamNetForCausalLM, RamState


class GatedLinearAttention(nn.Module):
    """GLA with its paper's proportions: 4 heads, keys of half the width, values of all of it, a gate of rank 16."""

    heads, rank, normalizer = 4, 16, 16

    def __init__(self, width: int) -> None:
        super().__init__()
        self.sizes = [width // 2, width // 2, width, width, self.rank]
        self.projections = nn.Linear(width, sum(self.sizes), bias=False)
        self.gate = nn.Linear(self.rank, width // 2)
        self.output = nn.Linear(width, width, bias=False)

    def state(self, batch: int, device: str) -> Tensor:
        """[B, H, key, value]."""
        key, value = (size // self.heads for size in self.sizes[1:3])
        return torch.zeros(batch, self.heads, key, value, device=device)

    def forward(self, x: Tensor, state: RamState, **_: Any) -> tuple[Tensor, RamState]:
        from fla.ops.gla import chunk_gla, fused_recurrent_gla

        *qkv, gate_out, low = self.projections(x).split(self.sizes, -1)
        q, k, v = (part.unflatten(-1, (self.heads, -1)) for part in qkv)
        g = F.logsigmoid(self.gate(low)).unflatten(-1, (self.heads, -1)) / self.normalizer
        memory = state.memory[0]
        if memory is None:
            out, new = chunk_gla(q, k, v, g)[0], None
        else:
            out, new = fused_recurrent_gla(q, k, v, gk=g, initial_state=memory, output_final_state=True)
        return self.output(_gated(out, gate_out)), replace(state, memory=[new])


class GatedDeltaNet(nn.Module):
    """Gated DeltaNet with head dimensions of 256 (keys) and 512 (values), and keys of three quarters of the width.

    It omits the short convolutions, which would only add to its time, and supports decoding only.
    """

    key, value = 256, 512

    def __init__(self, width: int) -> None:
        super().__init__()
        self.heads = max(1, width * 3 // 4 // self.key)
        inner = self.heads * self.value
        self.sizes = [self.heads * self.key, self.heads * self.key, inner, inner, self.heads, self.heads]
        self.projections = nn.Linear(width, sum(self.sizes), bias=False)
        self.log_rate = nn.Parameter(torch.rand(self.heads))
        self.bias = nn.Parameter(torch.zeros(self.heads))
        self.output = nn.Linear(inner, width, bias=False)

    def state(self, batch: int, device: str) -> Tensor:
        """[B, H, key, value]."""
        return torch.zeros(batch, self.heads, self.key, self.value, device=device)

    def forward(self, x: Tensor, state: RamState, **_: Any) -> tuple[Tensor, RamState]:
        from fla.ops.gated_delta_rule import fused_recurrent_gated_delta_rule

        *qkv, gate_out, a, b = self.projections(x).split(self.sizes, -1)
        q, k, v = (F.silu(part).unflatten(-1, (self.heads, -1)) for part in qkv)
        g = -self.log_rate.float().exp() * F.softplus(a.float() + self.bias)
        out, new = fused_recurrent_gated_delta_rule(
            q, k, v, g=g, beta=b.sigmoid(), initial_state=state.memory[0], output_final_state=True,
            use_qk_l2norm_in_kernel=True,
        )  # fmt: skip
        return self.output(_gated(out, gate_out)), replace(state, memory=[new])


def _gated(out: Tensor, gate: Tensor) -> Tensor:
    """Normalise each head of [B, T, H, value] and multiply by silu(gate), [B, T, H·value]."""
    return (F.rms_norm(out, out.shape[-1:]).flatten(2) * F.silu(gate)).to(gate.dtype)


class Peer(nn.Module):
    """The model of ``config`` with a mixer of ``kind`` in each block.

    Args:
        compiles: compile the blocks with torch.compile, whose graphs break at the library's kernels.

    Raises:
        ImportError: if flash-linear-attention is not installed.
    """

    def __init__(
        self, config: RamNetConfig, kind: type[GatedLinearAttention] | type[GatedDeltaNet], compiles: bool
    ) -> None:
        super().__init__()
        require_fla()
        self.skeleton = RamNetForCausalLM(config)
        for block in self.skeleton.blocks:
            block.mixer = kind(config.hidden_size)
            if compiles:
                block.compile()

    def states(self, batch: int, device: str) -> list[Tensor]:
        """Return the state of every layer before the first token, in float32."""
        return [block.mixer.state(batch, device) for block in self.skeleton.blocks]  # type: ignore[operator, union-attr]

    def forward(self, input_ids: Tensor, states: list[Tensor] | None = None) -> tuple[Tensor, list[Tensor | None]]:
        """Return logits [B, T, V] and the states after the last token, which are None if ``states`` is."""
        x = self.skeleton.embedding(input_ids)
        after = []
        for i, block in enumerate(self.skeleton.blocks):
            x, new, _ = block(x, None if states is None else states[i], None, None, False)
            after.append(new)
        return self.skeleton.head(self.skeleton.norm(x)), after
