"""From logits to a token."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from numbers import Integral, Real

import torch
from torch import Tensor

from ramnet.generation.checks import check

# Numbers that a row draws at a time. A generator's call takes 2 µs on a CPU, and a launch on a GPU.
DRAWN_AT_ONCE = 64


@dataclass(frozen=True)
class Sampling:
    """How a token is chosen; the fields are arguments of ``generate``. ValueError for settings that mean nothing."""

    temperature: float = 0.0
    top_k: int = 0
    top_p: float = 1.0
    min_p: float = 0.0
    repetition_penalty: float = 1.0

    def __post_init__(self) -> None:
        check("temperature", self.temperature, Real, lambda x: 0 <= x < math.inf, "finite and >= 0")
        check("top_k", self.top_k, Integral, lambda x: x >= 0, ">= 0")
        check("top_p", self.top_p, Real, lambda x: 0 < x <= 1, "in (0, 1]")
        check("min_p", self.min_p, Real, lambda x: 0 <= x <= 1, "in [0, 1]")
        check("repetition_penalty", self.repetition_penalty, Real, lambda x: 0 < x < math.inf, "finite and above 0")

    def choose(self, logits: Tensor, uniforms: Callable[[], Tensor]) -> Tensor:
        """int64 [B] of logits [B, V]; ``uniforms`` gives B numbers of [0, 1), float64, where it is drawn by lot."""
        if self.temperature == 0:
            return logits.argmax(dim=-1)
        total = self.probabilities(logits).cumsum(dim=-1)
        whole = total[:, -1:]
        # Below the sum of all, to which the product may round: the token is the first whose sum is past it.
        drawn = torch.minimum(uniforms().unsqueeze(1) * whole, whole.nextafter(torch.zeros_like(whole)))
        return (total <= drawn).sum(dim=-1)

    def probabilities(self, logits: Tensor) -> Tensor:
        """float64 [B, V], in proportion; 0 for the tokens that are left out."""
        # The largest goes to 0 first: a tiny temperature then sends the others to -inf, and not the largest to inf.
        scaled = logits.double()
        scaled = (scaled - scaled.amax(dim=-1, keepdim=True)) / self.temperature
        if self.top_k:
            kth = scaled.topk(min(self.top_k, scaled.shape[-1])).values[:, -1:]
            scaled = scaled.masked_fill(scaled < kth, -torch.inf)
        if self.top_p < 1:
            ordered, order = scaled.sort(dim=-1, descending=True)
            probability = ordered.softmax(dim=-1)
            # A token is left out when those before it hold top_p already, so that the likeliest always stays.
            left_out = probability.cumsum(dim=-1) - probability >= self.top_p
            scaled = scaled.masked_fill(left_out.gather(-1, order.argsort(dim=-1)), -torch.inf)
        if self.min_p:
            scaled = scaled.masked_fill(scaled < math.log(self.min_p), -torch.inf)
        return scaled.exp()

    def penalise(self, logits: Tensor, seen: Tensor | None) -> Tensor:
        """Logits of tokens that were ``seen``, bool [B, V], divided by the penalty where above 0, else multiplied."""
        if seen is None:
            return logits
        penalised = torch.where(logits > 0, logits / self.repetition_penalty, logits * self.repetition_penalty)
        return torch.where(seen, penalised, logits)

    def seen(self, input_ids: Tensor, vocab_size: int, attention_mask: Tensor | None) -> Tensor | None:
        """bool [B, V], the tokens of a prompt [B, T] without its padding; None where none is penalised."""
        if self.repetition_penalty == 1:
            return None
        if attention_mask is not None:  # the last column is all tokens
            input_ids = torch.where(attention_mask.bool(), input_ids, input_ids[:, -1:])
        seen = torch.zeros(input_ids.shape[0], vocab_size, dtype=torch.bool, device=input_ids.device)
        return seen.scatter_(1, input_ids.long(), True)


class Uniforms:
    """At each call [B] numbers of [0, 1), float64.

    With seeds each row has a generator of its own, so that what it draws depends on no other row. Without, torch's
    global generator is used.
    """

    def __init__(self, seeds: Sequence[int] | None, rows: int, device: torch.device) -> None:
        self.rows, self.device, self.drawn = rows, device, DRAWN_AT_ONCE
        self.generators = None if seeds is None else [torch.Generator(device).manual_seed(seed) for seed in seeds]

    def __call__(self) -> Tensor:
        if self.generators is None:
            return torch.rand(self.rows, dtype=torch.float64, device=self.device)
        if self.drawn == DRAWN_AT_ONCE:
            self.table = torch.stack([self._draw(generator) for generator in self.generators])
            self.drawn = 0
        self.drawn += 1
        return self.table[:, self.drawn - 1]

    def _draw(self, generator: torch.Generator) -> Tensor:
        return torch.rand(DRAWN_AT_ONCE, generator=generator, dtype=torch.float64, device=self.device)


def seeds_of_rows(seed: int | Sequence[int] | None, rows: int) -> list[int] | None:
    """Row i's seed: that of a sequence, or ``seed`` + i. ValueError for one that torch does not take."""
    if seed is None:
        return None
    given = list(seed) if isinstance(seed, Sequence) else [seed]
    for each in given:
        check("seed", each, Integral, lambda x: -(2**63) <= x < 2**64, "from -2**63 to 2**64 - 1")
    if not isinstance(seed, Sequence):
        return [(int(seed) + row) % 2**64 for row in range(rows)]
    if len(given) != rows:
        raise ValueError(f"seed holds {len(given)} numbers for {rows} prompts; give one for each, or a single one")
    return [int(each) for each in given]
