"""Choosing a token from logits."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from numbers import Integral

import torch
from torch import Tensor

from ramnet.generation.checks import check
from ramnet.generation.options import SamplingOptions

# Random numbers drawn for a row at a time: a call of a generator takes 2 µs on a CPU, and a kernel launch on a GPU.
DRAWN_AT_ONCE = 64


class Sampling(SamplingOptions):
    """Chooses tokens from logits."""

    def choose(self, logits: Tensor, uniforms: Callable[[], Tensor]) -> Tensor:
        """Choose tokens int64 [B] from logits [B, V]; ``uniforms`` returns float64 [B] in [0, 1) for sampling."""
        if self.temperature == 0:
            return logits.argmax(dim=-1)
        total = self.probabilities(logits).cumsum(dim=-1)
        whole = total[:, -1:]
        # The token is the first whose cumulative sum exceeds the drawn number, which must stay below the total although
        # the product may round up to it.
        drawn = torch.minimum(uniforms().unsqueeze(1) * whole, whole.nextafter(torch.zeros_like(whole)))
        return (total <= drawn).sum(dim=-1)

    def probabilities(self, logits: Tensor) -> Tensor:
        """Return unnormalised probabilities, float64 [B, V]; 0 for tokens that are excluded."""
        # Subtract the maximum before the division, so that a tiny temperature does not overflow to inf.
        scaled = logits.double()
        scaled = (scaled - scaled.amax(dim=-1, keepdim=True)) / self.temperature
        if self.top_k:
            kth = scaled.topk(min(self.top_k, scaled.shape[-1])).values[:, -1:]
            scaled = scaled.masked_fill(scaled < kth, -torch.inf)
        if self.top_p < 1:
            ordered, order = scaled.sort(dim=-1, descending=True, stable=True)
            probability = ordered.softmax(dim=-1)
            # A token is excluded if the more probable ones already sum to top_p; the most probable always stays.
            left_out = probability.cumsum(dim=-1) - probability >= self.top_p
            scaled = scaled.masked_fill(left_out.gather(-1, order.argsort(dim=-1)), -torch.inf)
        if self.min_p:
            scaled = scaled.masked_fill(scaled < math.log(self.min_p), -torch.inf)
        return scaled.exp()

    def penalise(self, logits: Tensor, seen: Tensor | None) -> Tensor:
        """Divide positive logits of tokens ``seen``, bool [B, V], by the penalty and multiply negative ones by it."""
        if seen is None:
            return logits
        penalised = torch.where(logits > 0, logits / self.repetition_penalty, logits * self.repetition_penalty)
        return torch.where(seen, penalised, logits)

    def seen(self, input_ids: Tensor, vocab_size: int, attention_mask: Tensor | None) -> Tensor | None:
        """Return bool [B, V], the tokens that occur in a prompt [B, T] outside padding; None if there is no penalty."""
        if self.repetition_penalty == 1:
            return None
        if attention_mask is not None:  # replace padding by the last column, which has none
            input_ids = torch.where(attention_mask.bool(), input_ids, input_ids[:, -1:])
        seen = torch.zeros(input_ids.shape[0], vocab_size, dtype=torch.bool, device=input_ids.device)
        return seen.scatter_(1, input_ids.long(), True)


class Uniforms:
    """Returns B random numbers in [0, 1), float64, at each call.

    With seeds, each row has its own generator, so that its numbers do not depend on other rows. Without, torch's global
    generator is used.
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
    """Return the seed of each row: ``seed[i]`` or ``seed`` + i. Raises ValueError for seeds that torch refuses."""
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
