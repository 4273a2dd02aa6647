"""Sampling token by token."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from ramnet.generation.options import Stops
from ramnet.generation.reading import Generated, LanguageModel, Prompts, check_finite, read, taint
from ramnet.generation.sampling import Sampling, Uniforms
from ramnet.generation.stopping import Watch

# Device types on which values can be read without synchronising.
SYNCHRONOUS = ("cpu",)


def sample(
    model: LanguageModel,
    prompts: Prompts,
    max_new_tokens: int,
    sampling: Sampling,
    seeds: Sequence[int] | None,
    stops: Stops,
    streamer: Callable[[Tensor], None] | None,
    return_state: bool,
) -> Generated:
    """Sample a continuation of each row. The other arguments are those of ``generate``, already checked."""
    input_ids, state, attention_mask, ends_alone = prompts
    rows, device = input_ids.shape[0], input_ids.device
    uniforms, watch = Uniforms(seeds, rows, device), Watch(stops, rows, device)
    seen = sampling.seen(input_ids, model.config.vocab_size, attention_mask)
    finished = torch.zeros(rows, dtype=torch.bool, device=device)
    lengths = torch.zeros(rows, dtype=torch.int64, device=device)
    watched = bool(stops) or streamer is not None or device.type in SYNCHRONOUS
    unread, token, columns, in_place = input_ids, input_ids[:, -1], [input_ids[:, :0]], state is None
    tainted = torch.zeros(rows, device=device)
    for _ in range(max_new_tokens):
        logits, state = read(model, unread, state, in_place, attention_mask)
        tainted, in_place, attention_mask = tainted + taint(logits), True, None
        if watched:
            check_finite(tainted)
        token = torch.where(finished, token, sampling.choose(sampling.penalise(logits, seen), uniforms))
        unread = token.unsqueeze(1)
        columns.append(unread)
        lengths += ~finished
        if stops and ends_alone and bool(finished.any()):
            attention_mask = ~finished.unsqueeze(1)
        if seen is not None:
            seen.scatter_(1, unread, True)
        if streamer is not None:
            streamer(token)
        if stops:
            finished |= watch.after(token)
            if bool(finished.all()):
                break
    check_finite(tainted)
    if return_state:
        state = read(model, unread, state, in_place, attention_mask)[1]
    return Generated(torch.cat(columns, dim=1), lengths, state)
