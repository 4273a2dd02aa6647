"""``generate``: what is asked for is checked here, before anything runs."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Sequence
from itertools import groupby
from numbers import Integral
from typing import Any

import torch
from torch import Tensor

from ramnet.generation.beams import search
from ramnet.generation.checks import check
from ramnet.generation.reading import LanguageModel, Said
from ramnet.generation.sampled import sample
from ramnet.generation.sampling import Sampling, seeds_of_rows
from ramnet.generation.stopping import Stops
from ramnet.ids import check_prompt
from ramnet.sequences import Sequences


@torch.no_grad()
def generate(
    model: LanguageModel,
    input_ids: Tensor | Sequence[Tensor | Sequence[int]],
    max_new_tokens: int,
    *,
    attention_mask: Tensor | None = None,
    temperature: float = 0.0,
    top_k: int = 0,
    top_p: float = 1.0,
    min_p: float = 0.0,
    repetition_penalty: float = 1.0,
    num_beams: int = 1,
    stop_tokens: Collection[int] = (),
    stop: str | Sequence[str] = (),
    decode: Callable[[list[int]], str] | None = None,
    seed: int | Sequence[int] | None = None,
    streamer: Callable[[Tensor], None] | None = None,
    state: Any = None,
    return_state: bool = False,
) -> Any:
    """Continue each prompt until ``max_new_tokens`` or until it stops.

    Prompts are read ``reading.TOKENS_AT_ONCE`` tokens at a time, so that memory does not grow with their length. Tokens
    are chosen where the logits are. On a GPU nothing waits for the device between tokens, unless there are stops to
    look for, beams, or a ``streamer`` to call.

    The state makes a conversation: a turn costs its own tokens, whatever came before::

        said, state = model.generate(first, 100, stop="\\n", return_state=True)
        more, state = model.generate(second, 100, stop="\\n", state=state, return_state=True)

    Args:
        input_ids: int64 [B, T] with T ≥ 1; or a list of prompts of any lengths ≥ 1, each int64 [T] or a list of ints.
            Prompts of a list that have one length are read together.
        attention_mask: bool or int64 [B, T] for prompts [B, T] of different lengths, 1 for a token and 0 for padding:
            each goes on as it does alone. The last column is all tokens: pad on the left.
        temperature: 0 takes the likeliest token; above, logits are divided by it and sampled.
        top_k: sample among the k likeliest only; 0 for all.
        top_p: sample among the likeliest that hold this much probability, in (0, 1].
        min_p: sample among those at least this many times as probable as the likeliest, in [0, 1].
        repetition_penalty: logits of the tokens of the prompt and of what was said are divided by it where they are
            above 0, and multiplied elsewhere (CTRL, arXiv 1909.05858); 1 changes nothing.
        num_beams: above 1, and with a temperature of 0, search for the likeliest continuation with so many beams; the
            sum of log-probabilities decides, whatever the length. Each beam has a state of its own.
        stop_tokens: a row that says one of these has stopped.
        stop: strings; a row has stopped once the text of its new tokens holds one.
        decode: the text of a list of new token ids, for ``stop``. Not needed where the vocabulary is the 256 bytes.
        seed: of the sampling, the same tokens at each run on a device. Row i draws from a generator of its own, seeded
            with ``seed`` + i, or with ``seed[i]`` of a sequence, so that no row's tokens depend on those beside it.
            None takes torch's global generator.
        streamer: called with each new column [B]; not with beams or a list of prompts.
        state: what came before the prompts, which is left as it was: of B rows, or for a list of prompts a list of
            states of one row each.
        return_state: also return the state after the last token, to go on from.

    Returns:
        int64 [B, T + new], where a row that has stopped repeats its last token. For a list of prompts, a list of int64
        [T + new], each ending where it stopped. With ``return_state`` a pair of this and the state, which has read all
        that is returned; for a list, a list of states of one row each.

    Raises:
        ValueError: for an empty prompt, ids outside the vocabulary, settings out of their ranges or that do not go
            together, a mask that does not fit or ends in padding, and a state of another model or batch.
        TypeError: for ids that are not integers, and settings of other types.
        RuntimeError: where the largest logit of a row is NaN or infinite, before ``streamer`` is called; on a GPU where
            nothing waits, at the end.
    """
    check("max_new_tokens", max_new_tokens, Integral, lambda x: x >= 0, ">= 0")
    check("num_beams", num_beams, Integral, lambda x: x >= 1, ">= 1")
    sampling = Sampling(temperature, top_k, top_p, min_p, repetition_penalty)
    stops = Stops(stop_tokens, stop, decode, model.config.vocab_size)
    if num_beams > 1 and temperature > 0:
        raise ValueError(f"temperature is {temperature} but num_beams is {num_beams}; beams do not sample: use 0")
    is_list = not isinstance(input_ids, Tensor)
    if streamer is not None and (is_list or num_beams > 1):
        raise ValueError("streamer is given a column at a time; it goes with neither a list of prompts nor beams")

    def run(prompts: Tensor, seeds: list[int] | None, state: Any) -> Said:
        if num_beams > 1:
            return search(
                model, prompts, max_new_tokens, num_beams, sampling, stops, state, return_state, attention_mask
            )
        return sample(
            model, prompts, max_new_tokens, sampling, seeds, stops, streamer, state, return_state, attention_mask
        )

    if isinstance(input_ids, Tensor):
        check_prompt(input_ids, model.config.vocab_size)
        if attention_mask is not None:
            _check_mask(model, input_ids, attention_mask)
        said = run(input_ids, seeds_of_rows(seed, input_ids.shape[0]), state)
        whole = torch.cat([input_ids, said.tokens], dim=1)
        return (whole, said.state) if return_state else whole

    if attention_mask is not None:
        raise ValueError("attention_mask goes with prompts in one tensor; a list holds prompts of any lengths")
    prompts = [_prompt(model, ids) for ids in input_ids]
    for prompt in prompts:
        check_prompt(prompt, model.config.vocab_size)
    seeds = seeds_of_rows(seed, len(prompts))
    if state is not None and (not isinstance(state, list | tuple) or len(state) != len(prompts)):
        raise ValueError(f"state must be a list of {len(prompts)} states of one row, as there are so many prompts")
    texts: list[Any] = [None] * len(prompts)
    states: list[Any] = [None] * len(prompts)
    for rows in _together(prompts, alone=return_state or state is not None):
        said = run(
            torch.cat([prompts[row] for row in rows]),
            None if seeds is None else [seeds[row] for row in rows],
            None if state is None else state[rows[0]],
        )
        for row, tokens, length in zip(rows, said.tokens, said.lengths.tolist(), strict=True):
            texts[row] = torch.cat([prompts[row][0], tokens[:length]])
            states[row] = said.state
    return (texts, states) if return_state else texts


def _check_mask(model: LanguageModel, input_ids: Tensor, attention_mask: Tensor) -> None:
    """ValueError for a mask that does not fit ``input_ids``, or ends in padding; TypeError for other types."""
    if not isinstance(model, torch.nn.Module):
        raise ValueError("attention_mask is given, but an exported model takes none; generate row by row")
    batch, tokens = input_ids.shape
    Sequences.padded(attention_mask, (batch, tokens), input_ids.device)
    ended = attention_mask[:, -1] == 0
    if bool(ended.any()):
        row = int(ended.nonzero()[0])
        raise ValueError(f"attention_mask ends in padding in row {row}; pad on the left, as the last column goes on")


def _prompt(model: LanguageModel, ids: Tensor | Sequence[int]) -> Tensor:
    """[1, T]; a list of ints goes where the model is."""
    if isinstance(ids, Tensor):
        return ids.unsqueeze(0)
    if not isinstance(ids, Sequence):
        raise TypeError(f"input_ids holds {ids!r}; a list must hold prompts, each a tensor or a list of token ids")
    device = next(model.parameters()).device if isinstance(model, torch.nn.Module) else None
    return torch.tensor([ids], device=device) if len(ids) else torch.empty(1, 0, dtype=torch.int64)


def _together(prompts: Sequence[Tensor], alone: bool) -> Iterator[list[int]]:
    """The numbers of the prompts that can be read as one batch: those of one length, or each by itself."""
    if alone:
        yield from ([row] for row in range(len(prompts)))
        return

    def length(row: int) -> int:
        return prompts[row].shape[1]

    for _, rows in groupby(sorted(range(len(prompts)), key=length), key=length):
        yield list(rows)
