"""The mixers: each is a causal map from [B, T, C] to [B, T, C], as ``ramnet.RamLayer``."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ramnet.baselines.recurrence import linear_recurrence


class Mixer(nn.Module):
    """What the mixers share: heads, and linear maps to and from them.

    Args:
        hidden_size: C.
        num_heads: H.
        key_dim: K, the width of a head's queries and keys.
        value_dim: V, the width of a head's values.
    """

    def __init__(self, hidden_size: int, num_heads: int, key_dim: int, value_dim: int) -> None:
        super().__init__()
        self.hidden_size, self.num_heads, self.key_dim, self.value_dim = hidden_size, num_heads, key_dim, value_dim
        self.query, self.key, self.value = (self.to_heads(width) for width in (key_dim, key_dim, value_dim))
        self.output = nn.Linear(num_heads * value_dim, hidden_size, bias=False)

    def to_heads(self, width: int, bias: bool = False) -> nn.Linear:
        return nn.Linear(self.hidden_size, self.num_heads * width, bias=bias)

    def heads(self, x: Tensor) -> Tensor:
        """[B, T, H·N] as [B, H, T, N]."""
        return x.unflatten(-1, (self.num_heads, -1)).transpose(1, 2)

    def joined(self, x: Tensor) -> Tensor:
        """[B, H, T, V] as [B, T, H·V]."""
        return x.transpose(1, 2).flatten(2)

    def state_size(self, tokens: int) -> int:
        """Return the numbers that a layer keeps of ``tokens`` tokens."""
        return self.num_heads * self.key_dim * self.value_dim


class Attention(Mixer):
    """Softmax attention with rotary positions, over all earlier tokens or the last ``window``."""

    def __init__(self, *sizes: int, window: int | None = None) -> None:
        super().__init__(*sizes)
        self.window = window

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = (self.heads(project(x)) for project in (self.query, self.key, self.value))
        q, k = rotated(q), rotated(k)
        if self.window is None:
            return self.output(self.joined(F.scaled_dot_product_attention(q, k, v, is_causal=True)))
        seen = torch.ones(x.shape[1], x.shape[1], dtype=torch.bool, device=x.device).tril().triu(1 - self.window)
        return self.output(self.joined(F.scaled_dot_product_attention(q, k, v, attn_mask=seen)))

    def state_size(self, tokens: int) -> int:
        return self.num_heads * (self.key_dim + self.value_dim) * min(tokens, self.window or tokens)


def rotated(x: Tensor) -> Tensor:
    """Rotate pairs of channels of x [B, H, T, K] by angles proportional to the position (RoPE)."""
    half = x.shape[-1] // 2
    rates = 10000 ** (-torch.arange(half, dtype=torch.float32, device=x.device) / half)
    angle = torch.arange(x.shape[2], device=x.device).unsqueeze(1) * rates
    first, second, rest = x.split([half, half, x.shape[-1] - 2 * half], dim=-1)
    cos, sin = angle.cos().to(x.dtype), angle.sin().to(x.dtype)
    return torch.cat([first * cos - second * sin, first * sin + second * cos, rest], dim=-1)


class LinearAttention(Mixer):
    """φ(q)ᵀ Σ φ(k) vᵀ / φ(q)ᵀ Σ φ(k) with φ = elu + 1 (Katharopoulos et al., 2020)."""

    eps = 1e-6  # φ rounds to 0 below -17, and 0/0 is NaN

    def forward(self, x: Tensor) -> Tensor:
        q, k = (F.elu(self.heads(project(x))) + 1 for project in (self.query, self.key))
        v = F.pad(self.heads(self.value(x)), (0, 1), value=1.0)
        out = linear_recurrence(q, k, v)
        return self.output(self.joined(out[..., :-1] / (out[..., -1:] + self.eps)))

    def state_size(self, tokens: int) -> int:
        return self.num_heads * self.key_dim * (self.value_dim + 1)


class Gated(Mixer):
    """A mixer whose output is normalised in each head and gated by silu(W x)."""

    def __init__(self, *sizes: int) -> None:
        super().__init__(*sizes)
        self.gate = self.to_heads(self.value_dim)
        self.norm = nn.RMSNorm(self.value_dim, eps=1e-5)

    def gated(self, x: Tensor, out: Tensor) -> Tensor:
        return self.output(self.joined(self.norm(out) * F.silu(self.heads(self.gate(x)))))


class GatedLinearAttention(Gated):
    """GLA: S_t = S_(t−1) Diag(w_t) + v_t k_tᵀ with w = sigmoid(W₂ W₁ x + b)^(1/16) (Yang et al., 2024)."""

    rank = 16

    def __init__(self, *sizes: int) -> None:
        super().__init__(*sizes)
        self.decay = nn.Sequential(nn.Linear(self.hidden_size, self.rank, bias=False),
                                   nn.Linear(self.rank, self.num_heads * self.key_dim))  # fmt: skip

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = (self.heads(project(x)) for project in (self.query, self.key, self.value))
        log_decay = F.logsigmoid(self.heads(self.decay(x))) / 16
        return self.gated(x, linear_recurrence(q * self.key_dim**-0.5, k, v, log_decay))


class DeltaNet(Mixer):
    """S_t = S_(t−1) (I − β k kᵀ) + β v kᵀ with normalised q and k (Schlag et al., 2021; Yang et al., 2024)."""

    def __init__(self, *sizes: int) -> None:
        super().__init__(*sizes)
        self.strength = self.to_heads(1)
        self.norm = nn.RMSNorm(self.value_dim, eps=1e-5)

    def forward(self, x: Tensor) -> Tensor:
        q, k = (F.normalize(F.silu(self.heads(project(x))), dim=-1) for project in (self.query, self.key))
        beta = self.heads(self.strength(x)).sigmoid()
        out = linear_recurrence(q, k, beta * self.heads(self.value(x)), None, -beta * k, k)
        return self.output(self.joined(self.norm(out)))


class Decays(nn.Module):
    """The decay e^(−A softplus(W x + b)) of a head, of Mamba-2 and Gated DeltaNet.

    A head begins with a draw, so models of few heads differ much from seed to seed: e^(−A softplus(b)) is 0.2 to 1. The
    ranges are Mamba-2's; Gated DeltaNet draws A from 0 up, not 1.
    """

    def __init__(self, hidden_size: int, num_heads: int) -> None:
        super().__init__()
        self.project = nn.Linear(hidden_size, num_heads, bias=False)
        self.log_rate = nn.Parameter(torch.empty(num_heads).uniform_(1, 16).log())  # ln A
        step = torch.exp(torch.rand(num_heads) * math.log(0.1 / 0.001) + math.log(0.001))
        self.bias = nn.Parameter(step.expm1().log())  # softplus⁻¹ of the step

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Return the step Δ and ln w = −A Δ, both [B, H, T, 1]."""
        step = F.softplus(self.project(x) + self.bias).transpose(1, 2).unsqueeze(-1)
        return step, -self.log_rate.exp()[:, None, None] * step


class GatedDeltaNet(Gated):
    """S_t = S_(t−1) w (I − β k kᵀ) + β v kᵀ, with a decay w of each head (Yang et al., 2025)."""

    def __init__(self, *sizes: int) -> None:
        super().__init__(*sizes)
        self.strength = self.to_heads(1)
        self.decays = Decays(self.hidden_size, self.num_heads)

    def forward(self, x: Tensor) -> Tensor:
        q, k = (F.normalize(F.silu(self.heads(project(x))), dim=-1) for project in (self.query, self.key))
        beta = self.heads(self.strength(x)).sigmoid()
        _, log_decay = self.decays(x)
        v = beta * F.silu(self.heads(self.value(x)))
        return self.gated(x, linear_recurrence(q, k, v, log_decay, -log_decay.exp() * beta * k, k))


class Mamba2(Gated):
    """S_t = w S_(t−1) + Δ v kᵀ, output S_t q + D v; q, k and v are C, B and x of the paper (Dao and Gu, 2024)."""

    def __init__(self, *sizes: int) -> None:
        super().__init__(*sizes)
        self.decays = Decays(self.hidden_size, self.num_heads)
        self.skip = nn.Parameter(torch.ones(self.num_heads))

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = (F.silu(self.heads(project(x))) for project in (self.query, self.key, self.value))
        step, log_decay = self.decays(x)
        return self.gated(x, linear_recurrence(q, k, step * v, log_decay) + self.skip[:, None, None] * v)

    def gated(self, x: Tensor, out: Tensor) -> Tensor:
        """Unlike the others, Mamba-2 gates before it normalises."""
        return self.output(self.joined(self.norm(out * F.silu(self.heads(self.gate(x))))))


class Rwkv7(Mixer):
    """S_t = S_(t−1) (Diag(w) − κ̂ (a ∘ κ̂)ᵀ) + v k̃ᵀ on inputs mixed with the token before (Peng et al., 2025).

    The value residual between layers is left out. Weights start much as in flash-linear-attention, without what depends
    on the layer's number: above all, decays start between 0.55 and nearly 1 in the channels of a head. The maps of low
    rank have rank 16, where the library's have at least 32.
    """

    rank = 16

    def __init__(self, *sizes: int) -> None:
        super().__init__(*sizes)
        width = self.num_heads * self.key_dim
        powers = torch.tensor([0.15, 0.675, 0.525, 0.525, 0.675, 0.15])  # of r, w, k, v, a and g
        self.shift = nn.Parameter(1 - (torch.arange(self.hidden_size) / self.hidden_size) ** powers.unsqueeze(1))

        def low_rank(outputs: int, bias: Tensor | None, middle: nn.Module) -> nn.Sequential:
            first, last = (nn.Linear(self.hidden_size, self.rank, bias=False),
                           nn.Linear(self.rank, outputs, bias=bias is not None))  # fmt: skip
            nn.init.zeros_(first.weight)
            nn.init.orthogonal_(last.weight, gain=0.1)
            if bias is not None:
                last.bias = nn.Parameter(bias)
            return nn.Sequential(first, middle, last)

        within = torch.linspace(-1, 1, self.key_dim).repeat(self.num_heads)
        decay = -5.5 + 6 * torch.linspace(0, 1, width) ** 1.5 + 2.5 * within * within.abs()
        self.decay = low_rank(width, decay, nn.Tanh())
        self.rate = low_rank(width, torch.full((width,), -0.19), nn.Identity())
        self.gate = low_rank(self.num_heads * self.value_dim, None, nn.Sigmoid())
        self.removal = nn.Parameter(torch.full((width,), 0.71))
        self.blend = nn.Parameter(torch.full((width,), 1.02))
        self.bonus = nn.Parameter(torch.zeros(self.num_heads, self.key_dim))
        self.norm = nn.GroupNorm(self.num_heads, self.num_heads * self.value_dim, eps=1e-5 * self.value_dim)
        for project, gain in ((self.query, 1.0), (self.key, 0.1), (self.value, 1.0)):
            nn.init.orthogonal_(project.weight, gain=gain)
        nn.init.zeros_(self.output.weight)

    def forward(self, x: Tensor) -> Tensor:
        before = F.pad(x, (0, 0, 1, 0))[:, :-1] - x
        r, w, k, v, a, g = (x + before * mix for mix in self.shift)
        query, log_decay = self.heads(self.query(r)), self.heads(-math.exp(-0.5) * self.decay(w).sigmoid())
        rate, plain = self.rate(a).sigmoid(), self.key(k)
        removed = F.normalize(self.heads(plain * self.removal), dim=-1)
        key = self.heads(plain * (1 + (rate - 1) * self.blend))
        value = self.heads(self.value(v))
        out = linear_recurrence(query, key, value, log_decay, -removed, self.heads(rate) * removed)
        joined = self.joined(out)
        out = self.heads(self.norm(joined.flatten(0, 1)).view_as(joined))
        bonus = (query * key * self.bonus[:, None]).sum(-1, keepdim=True) * value
        return self.output(self.joined(out + bonus) * self.gate(g))

    def state_size(self, tokens: int) -> int:
        return super().state_size(tokens) + self.hidden_size
