"""``generate``: checks its arguments, then samples or runs beam search."""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence
from numbers import Integral
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from ramnet.generation.beams import search
from ramnet.generation.checks import check
from ramnet.generation.options import Stops
from ramnet.generation.reading import Generated, LanguageModel, Prompts
from ramnet.generation.sampled import sample
from ramnet.generation.sampling import Sampling, seeds_of_rows
from ramnet.ids import check_prompt
from ramnet.sequences import Sequences
from ramnet.state import RamState


@torch.no_grad()
def generate(  # noqa: PLR0913 - the settings of a generation, each a keyword, as other libraries have them
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
    """Continue each prompt by ``max_new_tokens`` tokens, or until it stops.

    Prompts are read in chunks of ``options.TOKENS_AT_ONCE`` tokens, so that memory does not grow with their length.
    On a GPU, tokens are chosen on the device, and generation does not synchronise between tokens unless there are
    stops, beams or a ``streamer``.

    With ``return_state``, the next turn of a conversation reads its own tokens only::

        generated, state = model.generate(first, 100, stop="\\n", return_state=True)
        more, state = model.generate(second, 100, stop="\\n", state=state, return_state=True)

    Args:
        input_ids: int64 [B, T] with T ≥ 1, or a list of prompts of any lengths ≥ 1, each int64 [T] or a list of ints.
            A list is run as one batch; an exported model, which takes no mask, runs it prompt by prompt.
        attention_mask: bool or integer [B, T], 1 for a token and 0 for padding, for prompts [B, T] of different
            lengths. Each row continues as it would alone. The last column must be tokens: pad on the left.
        temperature: 0 takes the most probable token; above 0, logits are divided by it and sampled.
        top_k: sample from the k most probable tokens only, and those as probable as the k-th; 0 disables it.
        top_p: sample from the smallest set of most probable tokens with at least this probability, in (0, 1].
        min_p: sample from tokens with at least this fraction of the largest probability, in [0, 1].
        repetition_penalty: divides positive logits of tokens that occurred in the prompt or were generated, and
            multiplies negative ones (CTRL, arXiv 1909.05858); 1 disables it.
        num_beams: above 1, run beam search with this many beams, which needs a temperature of 0. Beams are ranked by
            the sum of log-probabilities, without a length penalty. Each beam has a state of its own.
        stop_tokens: a row stops after generating one of these.
        stop: a string or strings; a row stops once the text of its new tokens contains one.
        decode: converts a list of new token ids to text, for ``stop``. Not needed if the tokens are the 256 bytes.
        seed: makes sampling reproducible on a given device. Row i draws from its own generator, seeded with
            ``seed`` + i, or ``seed[i]`` of a sequence, so that its tokens do not depend on other rows. None uses
            torch's global generator.
        streamer: called with each new column of tokens, int64 [B]; excludes beams and lists of prompts.
        state: the state before the prompts, of B rows; for a list of prompts, a list of states of one row each. It is
            not modified.
        return_state: also return the state after the last token.

    Returns:
        int64 [B, T + new], where a row that has stopped repeats its last token. For a list of prompts, a list of int64
        [T + new], each ending where it stopped. With ``return_state``, a pair of this and the state after all returned
        tokens; for a list, a list of states of one row each.

    Raises:
        ValueError: if a prompt is empty, an id is outside the vocabulary, an option is out of range or excluded by
            another, the mask does not fit or ends in padding, or ``state`` does not fit the model or batch.
        TypeError: if ids are not integers, or an option has a wrong type.
        RuntimeError: if the largest logit of a row is NaN or infinite. It is raised before ``streamer`` is called or,
            if generation does not synchronise, after the last token.
    """
    check("max_new_tokens", max_new_tokens, Integral, lambda x: x >= 0, ">= 0")
    check("num_beams", num_beams, Integral, lambda x: x >= 1, ">= 1")
    sampling = Sampling(temperature, top_k, top_p, min_p, repetition_penalty)
    stops = Stops(stop_tokens, stop, decode, model.config.vocab_size)
    if num_beams > 1 and temperature > 0:
        raise ValueError(f"temperature is {temperature} but num_beams is {num_beams}; beams do not sample: use 0")
    is_list = not isinstance(input_ids, Tensor)
    if streamer is not None and (is_list or num_beams > 1):
        raise ValueError("streamer is given; it works with neither a list of prompts nor beams")

    def run(prompts: Prompts, seeds: list[int] | None) -> Generated:
        if num_beams > 1:
            return search(model, prompts, max_new_tokens, num_beams, sampling, stops, return_state)
        return sample(model, prompts, max_new_tokens, sampling, seeds, stops, streamer, return_state)

    if isinstance(input_ids, Tensor):
        check_prompt(input_ids, model.config.vocab_size)
        if attention_mask is not None:
            _check_mask(model, input_ids, attention_mask)
        generated = run(Prompts(input_ids, state, attention_mask), seeds_of_rows(seed, input_ids.shape[0]))
        whole = torch.cat([input_ids, generated.tokens], dim=1)
        return (whole, generated.state) if return_state else whole

    if attention_mask is not None:
        raise ValueError("attention_mask is given with a list of prompts; it works only with prompts in one tensor")
    prompts = [_prompt(model, ids) for ids in input_ids]
    for prompt in prompts:
        check_prompt(prompt, model.config.vocab_size)
    seeds = seeds_of_rows(seed, len(prompts))
    if state is not None and (not isinstance(state, list | tuple) or len(state) != len(prompts)):
        raise ValueError(f"state must be a list of {len(prompts)} states of one row, one for each prompt")
    for i, each in enumerate(state or ()):
        if each is None:
            raise TypeError(f"state[{i}] is None; each prompt needs a state, or none of them")
    texts: list[Tensor] = []
    states: list[Any] = []
    size = max(1, len(prompts)) if isinstance(model, torch.nn.Module) else 1  # exported graphs take no mask
    for first in range(0, len(prompts), size):
        rows = slice(first, first + size)
        ids, mask = _left_padded(prompts[rows])
        before = None if state is None else state[first] if size == 1 else RamState.merge(state)
        generated = run(
            Prompts(ids, before, mask, ends_alone=True),
            None if seeds is None else seeds[rows],
        )
        for prompt, tokens, length in zip(prompts[rows], generated.tokens, generated.lengths.tolist(), strict=True):
            texts.append(torch.cat([prompt[0], tokens[:length]]))
        if return_state:
            states += [generated.state] if size == 1 else generated.state.split()
    return (texts, states) if return_state else texts


def _check_mask(model: LanguageModel, input_ids: Tensor, attention_mask: Tensor) -> None:
    """Raise ValueError if the mask does not fit ``input_ids`` or ends in padding, TypeError if it is floating."""
    if not isinstance(model, torch.nn.Module):
        raise ValueError("attention_mask is given, but exported models do not support it; generate row by row")
    batch, tokens = input_ids.shape
    Sequences.padded(attention_mask, (batch, tokens), input_ids.device)
    ended = attention_mask[:, -1] == 0
    if bool(ended.any()):
        row = int(ended.nonzero()[0])
        raise ValueError(f"attention_mask ends in padding in row {row}; pad on the left")


def _prompt(model: LanguageModel, ids: Tensor | Sequence[int]) -> Tensor:
    """Convert a prompt to [1, T]; a list of ints is put on the model's device."""
    if isinstance(ids, Tensor):
        return ids.unsqueeze(0)
    if not isinstance(ids, Sequence):
        raise TypeError(f"input_ids holds {ids!r}; a list must hold prompts, each a tensor or a list of token ids")
    device = next(model.parameters()).device if isinstance(model, torch.nn.Module) else None
    try:
        return torch.tensor([ids], device=device) if len(ids) else torch.empty(1, 0, dtype=torch.int64)
    except (TypeError, ValueError, RuntimeError, OverflowError):
        wrong = next((each for each in ids if not isinstance(each, int) or not -(2**63) <= each < 2**63), ids)
        raise TypeError(f"a prompt holds {wrong!r}; it must hold token ids") from None


def _left_padded(prompts: Sequence[Tensor]) -> tuple[Tensor, Tensor | None]:
    """Pad prompts, each [1, T], on the left to one [B, T]; also return its mask, None if all lengths are equal."""
    lengths = [prompt.shape[1] for prompt in prompts]
    longest = max(lengths)
    if min(lengths) == longest:
        return torch.cat(list(prompts)), None
    padding = torch.tensor([longest - length for length in lengths], device=prompts[0].device)
    padded = torch.cat([F.pad(prompt, (longest - prompt.shape[1], 0)) for prompt in prompts])
    return padded, torch.arange(longest, device=padded.device) >= padding.unsqueeze(1)
