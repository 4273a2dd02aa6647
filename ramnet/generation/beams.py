"""The likeliest continuation, among those that a beam of each length's best leads to."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ramnet.generation.reading import LanguageModel, Said, check_finite, read, taint
from ramnet.generation.sampling import Sampling
from ramnet.generation.stopping import Stops, Watch


def search(
    model: LanguageModel,
    input_ids: Tensor,
    max_new_tokens: int,
    beams: int,
    sampling: Sampling,
    stops: Stops,
    state: Any,
    return_state: bool,
    attention_mask: Tensor | None,
) -> Said:
    """For each row the continuation of the largest sum of log-probabilities that was found.

    At each token the best ``beams`` of a row's beams and all their next tokens are kept. A beam that stopped keeps its
    sum and goes on with its last token. As sums only fall, a row is decided once its best beam has stopped. The other
    arguments are those of ``generate``, checked.
    """
    rows, device, vocab_size = input_ids.shape[0], input_ids.device, model.config.vocab_size
    first = torch.arange(rows, device=device).unsqueeze(1) * beams  # [B, 1], of the flat list of beams
    copies = torch.arange(rows, device=device).repeat_interleave(beams)
    watch = Watch(stops, rows * beams, device)
    said = torch.empty(rows * beams, 0, dtype=torch.int64, device=device)
    lengths = torch.zeros(rows * beams, dtype=torch.int64, device=device)
    finished = torch.zeros(rows * beams, dtype=torch.bool, device=device)
    # One beam to begin with: equal beams would stay equal.
    sums = torch.full((rows, beams), -torch.inf, dtype=torch.float64, device=device)
    sums[:, 0] = 0
    unread, in_place, begun = input_ids, state is None, state
    for at in range(max_new_tokens):
        logits, state = read(model, unread, state, in_place, attention_mask if at == 0 else None)
        check_finite(taint(logits).view(rows, -1).sum(dim=1))
        if at == 0:
            begun, logits, state = state, logits[copies], state.reorder(copies)
            mask = None if attention_mask is None else attention_mask[copies]
            seen = sampling.seen(input_ids[copies], vocab_size, mask)
        log_probability = sampling.penalise(logits, seen).double().log_softmax(dim=-1)
        if stops and at > 0:
            only_last = torch.full_like(log_probability, -torch.inf).scatter_(1, said[:, -1:], 0)
            log_probability = torch.where(finished.unsqueeze(1), only_last, log_probability)
        sums, best = (sums.unsqueeze(2) + log_probability.view(rows, beams, -1)).flatten(1).topk(beams)
        source, token = (first + best // vocab_size).flatten(), (best % vocab_size).flatten()
        unread, in_place = token.unsqueeze(1), True
        said, finished = torch.cat([said[source], unread], dim=1), finished[source]
        lengths, state = lengths[source] + ~finished, state.reorder(source)
        if seen is not None:
            seen = seen[source].scatter_(1, unread, True)
        if stops:
            watch.reorder(source)
            finished = finished | watch.after(token)
            if bool(finished[first].all()):
                break
    said, lengths = said[first.flatten()], lengths[first.flatten()]
    if max_new_tokens:
        said = said[:, : int(lengths.max())]  # the rest is repeated
    if return_state:  # those of the beams have read what was repeated
        unread, mask = (said, None) if max_new_tokens else (input_ids, attention_mask)
        state = read(model, unread, begun, bool(max_new_tokens), mask)[1]
    return Said(said, lengths, state)
