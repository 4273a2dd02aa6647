"""Sampling from a model, one token at a time."""

from __future__ import annotations

import math
from collections.abc import Callable, Collection
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from ramnet.ids import check_range, check_type

if TYPE_CHECKING:
    from ramnet.model import RamNetForCausalLM
    from ramnet.state import RamState

# Of a prompt, the whole batch counted. Measured for "340m" in float32 on a CPU: 175 MB of activations, where 16 384
# tokens at once take 1.05 GB, and no slower.
TOKENS_AT_ONCE = 2048
# Kinds of devices where looking at a number waits for nothing.
SYNCHRONOUS = ("cpu",)


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

    The prompt is read ``TOKENS_AT_ONCE`` tokens at a time, so that memory does not grow with its length. Tokens are
    chosen where the logits are. On a GPU nothing waits for the device between tokens, unless there are stop tokens to
    look for or there is an ``on_token`` to call.

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
        RuntimeError: where the largest logit of a row is NaN or infinite, before ``on_token`` is called; on a GPU where
            nothing waits, at the end.
    """
    choose = sampler(temperature, top_k, top_p, seed)
    check_prompt(input_ids, max_new_tokens, model.config.vocab_size)
    stops = torch.tensor(sorted(stop_tokens), dtype=torch.int64, device=input_ids.device)
    columns = [input_ids]
    finished = torch.zeros(input_ids.shape[0], dtype=torch.bool, device=input_ids.device)
    watched = bool(stop_tokens) or on_token is not None or input_ids.device.type in SYNCHRONOUS
    token, state = input_ids[:, -1], None
    taint = torch.zeros(input_ids.shape[0], device=input_ids.device)
    for _ in range(max_new_tokens):
        logits, state = _read(model, columns[-1], state)
        taint = taint + 0 * logits.amax(dim=-1)  # 0 as long as the largest has been finite, NaN from then on
        if watched:
            _check(taint)
        else:  # sampling from NaN would stop the device
            logits = logits.masked_fill(taint.isnan().unsqueeze(1), 0)
        token = torch.where(finished, token, choose(logits))
        columns.append(token.unsqueeze(1))
        if on_token is not None:
            on_token(token)
        if stop_tokens:
            finished |= torch.isin(token, stops)
            if bool(finished.all()):
                break
    _check(taint)
    return torch.cat(columns, dim=1)


def _read(model: RamNetForCausalLM, input_ids: Tensor, state: RamState | None) -> tuple[Tensor, RamState]:
    """The logits [B, V] after the last of ``input_ids`` [B, T], T ≥ 1, and the state there."""
    batch, tokens = input_ids.shape
    # An exported graph gives the logits of every token.
    last = {"logits_to_keep": 1} if isinstance(model, torch.nn.Module) else {}
    # Parts of nearly one length, so that a compiled model sees few lengths.
    for part in input_ids.tensor_split(-(-tokens // max(1, TOKENS_AT_ONCE // batch)), dim=1):
        out = model(part, state, in_place=part.shape[1] == 1, **last)
        state = out.state
    return out.logits[:, -1], out.state


def _check(taint: Tensor) -> None:
    """RuntimeError, naming the first row, where a number is NaN."""
    if math.isnan(float(taint.sum())):
        row = int(taint.isnan().nonzero()[0])
        raise RuntimeError(
            f"the largest logit of row {row} is NaN or infinite, so that no token can be chosen;"
            " look for NaN and infinity in the model's weights"
        )


def check_prompt(input_ids: Tensor, max_new_tokens: int, vocab_size: int) -> None:
    """ValueError for an empty prompt, ids outside the vocabulary, or a negative length; TypeError for other types."""
    check_type(input_ids)
    if input_ids.dim() != 2 or input_ids.numel() < 1:
        raise ValueError(f"input_ids has shape {list(input_ids.shape)}; generate needs [B, T] with B and T >= 1")
    if max_new_tokens < 0:
        raise ValueError(f"max_new_tokens is {max_new_tokens}; it must be >= 0")
    check_range(input_ids, vocab_size)


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
