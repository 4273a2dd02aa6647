"""Beam search."""

from __future__ import annotations

import torch

from ramnet.generation.options import Stops
from ramnet.generation.reading import Generated, LanguageModel, Prompts, check_finite, read, taint
from ramnet.generation.sampling import Sampling
from ramnet.generation.stopping import Watch


def search(
    model: LanguageModel,
    prompts: Prompts,
    max_new_tokens: int,
    beams: int,
    sampling: Sampling,
    stops: Stops,
    return_state: bool,
) -> Generated:
    """Return, for each row, the continuation with the largest sum of log-probabilities that was found.

    At each token, a row keeps the best ``beams`` of all continuations of its beams. A beam that has stopped repeats its
    last token at log-probability 0. As sums never grow, a row is finished once its best beam has stopped. The other
    arguments are those of ``sample``, already checked.
    """
    input_ids, state, attention_mask, ends_alone = prompts
    rows, device, vocab_size = input_ids.shape[0], input_ids.device, model.config.vocab_size
    first = torch.arange(rows, device=device).unsqueeze(1) * beams  # [B, 1], index of each row's best beam
    copies = torch.arange(rows, device=device).repeat_interleave(beams)
    watch = Watch(stops, rows * beams, device)
    generated = torch.empty(rows * beams, 0, dtype=torch.int64, device=device)
    lengths = torch.zeros(rows * beams, dtype=torch.int64, device=device)
    finished = torch.zeros(rows * beams, dtype=torch.bool, device=device)
    # Only one beam of each row starts at log-probability 0, as identical beams would stay identical.
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
            only_last = torch.full_like(log_probability, -torch.inf).scatter_(1, generated[:, -1:], 0)
            log_probability = torch.where(finished.unsqueeze(1), only_last, log_probability)
        sums, best = (sums.unsqueeze(2) + log_probability.view(rows, beams, -1)).flatten(1).topk(beams)
        source, token = (first + best // vocab_size).flatten(), (best % vocab_size).flatten()
        unread, in_place = token.unsqueeze(1), True
        generated, finished = torch.cat([generated[source], unread], dim=1), finished[source]
        lengths, state = lengths[source] + ~finished, state.reorder(source)
        if seen is not None:
            seen = seen[source].scatter_(1, unread, True)
        if stops:
            watch.reorder(source)
            finished = finished | watch.after(token)
            if bool(finished[first].all()):
                break
    generated, lengths = generated[first.flatten()], lengths[first.flatten()]
    if max_new_tokens:
        generated = generated[:, : int(lengths.max())]  # the columns after it only repeat last tokens
    if return_state:  # the states of the beams have also read the repeated tokens
        unread, mask = (generated, None) if max_new_tokens else (input_ids, attention_mask)
        if ends_alone and bool((lengths < generated.shape[1]).any()):
            mask = torch.arange(generated.shape[1], device=device) < lengths.unsqueeze(1)
        state = read(model, unread, begun, bool(max_new_tokens), mask)[1]
    return Generated(generated, lengths, state)
