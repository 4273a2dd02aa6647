"""Sampling from a model, one token at a time."""

from __future__ import annotations

import math
from collections.abc import Callable, Collection
from typing import TYPE_CHECKING

import torch
from torch import Tensor

if TYPE_CHECKING:
    from ramnet.model import RamNetForCausalLM


@torch.no_grad()
def generate(
    model: RamNetForCausalLM,
    input_ids: Tensor,
    max_new_tokens: int,
    *,
    temperature: float = 0.0,
    top_k: int = 0,
    top_p: float = 1.0,
    stop_tokens: Collection[int] = (),
    seed: int | None = None,
    on_token: Callable[[Tensor], None] | None = None,
) -> Tensor:
    """Continue ``input_ids`` until ``max_new_tokens`` or, in every row, a stop token.

    Tokens are chosen where the logits are. On a GPU nothing waits for the device between tokens, unless there are
    stop tokens to look for or ``on_token`` reads what it is given.

    Args:
        input_ids: int64 [B, T] with T ≥ 1.
        temperature: 0 takes the likeliest token; above, logits are divided by it and sampled.
        top_k: sample among the k likeliest only; 0 for all.
        top_p: sample among the likeliest that hold this much probability, in (0, 1].
        stop_tokens: a row that says one of these repeats it to the end.
        seed: of the sampling, the same tokens at each run on a device; None takes torch's global generator.
        on_token: called with each new column [B].

    Returns:
        int64 [B, T + new].

    Raises:
        ValueError: for an empty prompt, ids outside the vocabulary, or settings out of their ranges.
        TypeError: for ids that are not integers.
    """
    choose = sampler(temperature, top_k, top_p, seed)
    check_prompt(input_ids, max_new_tokens, model.config.vocab_size)
    stops = torch.tensor(sorted(stop_tokens), dtype=torch.int64, device=input_ids.device)
    columns = [input_ids]
    finished = torch.zeros(input_ids.shape[0], dtype=torch.bool, device=input_ids.device)
    token, state = input_ids[:, -1], None
    for step in range(max_new_tokens):
        logits, state = model(columns[-1], state, in_place=step > 0)
        token = torch.where(finished, token, choose(logits[:, -1]))
        columns.append(token.unsqueeze(1))
        if on_token is not None:
            on_token(token)
        if stop_tokens:
            finished |= torch.isin(token, stops)
            if bool(finished.all()):
                break
    return torch.cat(columns, dim=1)


def check_prompt(input_ids: Tensor, max_new_tokens: int, vocab_size: int) -> None:
    """ValueError for an empty prompt, ids outside the vocabulary, or a negative length; TypeError for other types."""
    if input_ids.dtype not in (torch.int64, torch.int32):
        raise TypeError(f"input_ids is {input_ids.dtype}; it must be torch.int64")
    if input_ids.dim() != 2 or input_ids.numel() < 1:
        raise ValueError(f"input_ids has shape {list(input_ids.shape)}; generate needs [B, T] with B and T >= 1")
    if max_new_tokens < 0:
        raise ValueError(f"max_new_tokens is {max_new_tokens}; it must be >= 0")
    low, high = int(input_ids.min()), int(input_ids.max())
    if low < 0 or high >= vocab_size:
        raise ValueError(f"input_ids holds {low if low < 0 else high}; token ids must be in 0..{vocab_size - 1}")


def sampler(temperature: float, top_k: int, top_p: float, seed: int | None) -> Callable[[Tensor], Tensor]:
    """A function from logits [B, V] to tokens int64 [B]; ValueError for settings that mean nothing."""
    if not 0 <= temperature < math.inf:
        raise ValueError(f"temperature is {temperature}; it must be finite and >= 0")
    if top_k < 0:
        raise ValueError(f"top_k is {top_k}; it must be >= 0")
    if not 0 < top_p <= 1:
        raise ValueError(f"top_p is {top_p}; it must be in (0, 1]")
    generator: torch.Generator | None = None

    def choose(logits: Tensor) -> Tensor:
        nonlocal generator
        if temperature == 0:
            return logits.argmax(dim=-1)
        if seed is not None and generator is None:
            generator = torch.Generator(logits.device).manual_seed(seed)
        # The largest goes to 0 first: a tiny temperature then sends the others to -inf, and not the largest to inf.
        scaled = logits.double()
        scaled = (scaled - scaled.amax(dim=-1, keepdim=True)) / temperature
        if top_k:
            kth = scaled.topk(min(top_k, scaled.shape[-1])).values[:, -1:]
            scaled = scaled.masked_fill(scaled < kth, -torch.inf)
        if top_p < 1:
            ordered, order = scaled.sort(dim=-1, descending=True)
            probability = ordered.softmax(dim=-1)
            # A token is left out when those before it hold top_p already, so that the likeliest always stays.
            left_out = probability.cumsum(dim=-1) - probability >= top_p
            scaled = scaled.masked_fill(left_out.gather(-1, order.argsort(dim=-1)), -torch.inf)
        return torch.multinomial(scaled.softmax(dim=-1), 1, generator=generator).squeeze(-1)

    return choose
