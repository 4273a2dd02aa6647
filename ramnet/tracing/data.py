"""What a trace holds, and what follows from it by the paper's recurrence (steps 5 and 6)."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from ramnet.ops import Accesses
from ramnet.state import RamState


class Reads(NamedTuple):
    """Whose writes each token reads. Weights are as in ``LayerTrace.sources``.

    Attributes:
        tokens: int64 [B, H, T, n], the indices of the n tokens whose writes it reads most, in descending order.
        weights: [B, H, T, n], the weights of these. Where fewer tokens were read, weights are 0 and tokens meaningless.
        total: [B, H, T], the sum of the weights of all tokens.
        before: [B, H, T], the weight of what was in the memory before the first token: the mass z_0 of a fresh state,
            whose values are 0, or what the tokens before a given state wrote.
        by_age: [B, H, T], the weights of all reads by age: index a holds those of writes a tokens earlier. A token
            reads after it has written, so the age of its own write is 0.
    """

    tokens: Tensor
    weights: Tensor
    total: Tensor
    before: Tensor
    by_age: Tensor


@dataclass(frozen=True)
class LayerTrace:
    """The accesses of one RAM-Net layer, on the CPU.

    Attributes:
        accesses: slots, int32, and weights, float32 or float64, of writes and reads, [B, H, T, K]. Slots are those of
            the memory, after the shift of CAPE. Weights of padding are 0.
        mass: z before the first token, [B, H, M].
        position: int64 [B, T], the index of each token among the tokens of its row that are not padding.
        decay_power: γ.
        eps: ε.
        cape_heads: the number of heads, counted from the first, that use CAPE.
    """

    accesses: Accesses[Tensor]
    mass: Tensor
    position: Tensor
    decay_power: float
    eps: float
    cape_heads: int

    @property
    def num_slots(self) -> int:
        """M."""
        return self.mass.shape[2]

    def use(self) -> tuple[Tensor, Tensor]:
        """Return the histogram of slot use: the sums of the weights written to and read from each slot, [B, H, M]."""
        slots, weights = self.accesses[::2], self.accesses[1::2]
        written, read = (
            torch.zeros_like(self.mass).scatter_add_(2, where.long().flatten(2), weight.to(self.mass.dtype).flatten(2))
            for where, weight in zip(slots, weights, strict=True)
        )
        return written, read

    def share_used(self) -> Tensor:
        """Return the share of the M slots that the tokens wrote at all, [B, H]."""
        return (self.use()[0] > 0).to(self.mass.dtype).mean(-1)

    def busiest_slots(self, share: float = 0.5) -> Tensor:
        """Return how few slots hold ``share`` of all that was written, int64 [B, H]; 0 if nothing was."""
        falling = self.use()[0].sort(-1, descending=True).values.double().cumsum(-1)
        return ((falling < share * falling[..., -1:]).sum(-1) + 1) * (falling[..., -1] > 0)

    def sources(self) -> Tensor:
        """Return how much each token reads of what each token wrote: A [B, H, T, T], 0 for later tokens.

        The head's output is o_t = Σ_s A[t, s] · v_s plus what it reads of the state before the first token. A[t, s] is
        Σ_j r_t[j] / (z_t[j] + ε) · w_s[j] · Π_u (1 − w_u[j])^γ over the slots j, with u from s + 1 to t: later
        writes to a slot replace earlier ones.
        """
        batch, heads, tokens = self.accesses.write_slots.shape[:3]
        found = self.mass.new_zeros(batch, heads, tokens, tokens)
        for t, (weights, _) in enumerate(self._rows()):
            found[:, :, t, : t + 1] = weights
        return found

    def reads(self, most: int = 8) -> Reads:
        """Return the ``most`` tokens whose writes each token reads most, and the ages of all that is read.

        The memory needed is that of the slots that are accessed times T, the time that of T². Measured on one core for
        "tiny", both layers: 0.6 s for 1000 tokens.
        """
        batch, heads, tokens = self.accesses.write_slots.shape[:3]
        found = Reads(
            self.mass.new_zeros(batch, heads, tokens, min(most, tokens), dtype=torch.int64),
            self.mass.new_zeros(batch, heads, tokens, min(most, tokens)),
            *(self.mass.new_zeros(batch, heads, tokens) for _ in range(3)),
        )
        for t, (weights, before) in enumerate(self._rows()):
            largest = weights.topk(min(most, t + 1))
            found.tokens[:, :, t, : t + 1] = largest.indices
            found.weights[:, :, t, : t + 1] = largest.values
            found.total[:, :, t] = weights.sum(-1)
            found.before[:, :, t] = before
            age = (self.position[:, t : t + 1] - self.position[:, : t + 1]).unsqueeze(1).expand_as(weights)
            found.by_age.scatter_add_(2, age, weights)
        return found

    def _rows(self) -> Iterator[tuple[Tensor, Tensor]]:
        """Yield, for each token t in turn, row t of ``sources``, [B, H, t + 1], and ``before`` of it, [B, H]."""
        batch, heads, slots = self.mass.shape
        tokens = self.accesses.write_slots.shape[2]
        first = slots * torch.arange(batch * heads, device=self.mass.device).view(-1, 1, 1)
        at = torch.stack([x.long().flatten(0, 1) + first for x in self.accesses[::2]])  # [2, N, T, K]
        # Only the R slots that are accessed are kept, as M may be far larger.
        accessed, at = at.unique(return_inverse=True)
        write_at, read_at = at.transpose(1, 2).unbind(0)  # [T, N, K]
        w, r = (x.to(self.mass.dtype).flatten(0, 1).transpose(0, 1) for x in self.accesses[1::2])
        decay = (1 - w) ** self.decay_power
        kept = self.mass.new_zeros(len(accessed), tokens)  # what is left in a slot of each token's write
        before = self.mass.flatten()[accessed]  # what is left of the mass before the first token
        z = before.clone()
        for t in range(tokens):
            at = write_at[t]
            kept[at, :t] *= decay[t].unsqueeze(-1)
            kept[at, t] = w[t]
            before[at] *= decay[t]
            z[at] = decay[t] * z[at] + w[t]
            scaled = r[t] / (z[read_at[t]] + self.eps)  # [N, K]
            row = torch.einsum("nk,nkt->nt", scaled, kept[read_at[t], : t + 1])
            yield row.view(batch, heads, -1), (scaled * before[read_at[t]]).sum(-1).view(batch, heads)


@dataclass(frozen=True)
class Trace:
    """What a model did to its memory while it read ``input_ids``.

    Attributes:
        input_ids: int64 [B, T], on the CPU.
        real: bool [B, T], False for padding.
        layers: one ``LayerTrace`` for each RAM-Net layer.
        state: the state after the last token, from which another trace can continue.
    """

    input_ids: Tensor
    real: Tensor
    layers: list[LayerTrace]
    state: RamState
