"""Independent rows: conversations, seeds, prompts of different lengths, stops."""

from __future__ import annotations

from itertools import product
from typing import Any

import pytest
import torch
from torch import Tensor

from ramnet import RamNetConfig, RamNetForCausalLM
from ramnet.generation.sampling import DRAWN_AT_ONCE, Uniforms
from tests.ramnet.test_generation import PROMPT, V, Watched
from tests.ramnet.test_generation import model as model
from tests.ramnet.test_model import assert_states_match

LETTERS = "abcdefghijk"


def spell(ids: list[int]) -> str:
    return "".join(LETTERS[token] for token in ids)


@pytest.mark.parametrize("first", [1, 3])
@pytest.mark.parametrize("second", [1, 2])
@pytest.mark.parametrize("num_beams", [1, 3])
def test_a_turn_goes_on_from_the_last_ones_state(
    kernels: str, model: RamNetForCausalLM, first: int, second: int, num_beams: int
) -> None:
    said, state = model.generate(PROMPT[:, :first], 6, return_state=True)
    assert_states_match(state, model(said).state, tolerance=1e-12)
    before = state.clone()
    question = torch.tensor([[7, 8], [9, 10]])[:, :second]
    options = {"num_beams": num_beams, "return_state": True}
    answer, after = model.generate(question, 6, state=state, **options)
    assert_states_match(state, before, tolerance=0)
    whole, expected = model.generate(torch.cat([said, question], dim=1), 6, **options)
    assert torch.equal(torch.cat([said, answer], dim=1), whole)
    assert_states_match(after, expected, tolerance=1e-12)


@pytest.mark.parametrize("num_beams", [1, 2])
def test_with_no_new_tokens_the_state_has_read_the_prompt(model: RamNetForCausalLM, num_beams: int) -> None:
    said, state = model.generate(PROMPT, 0, return_state=True, num_beams=num_beams)
    assert torch.equal(said, PROMPT)
    assert_states_match(state, model(PROMPT).state, tolerance=0)


def test_a_row_that_stopped_has_a_state_after_all_that_is_returned(model: RamNetForCausalLM) -> None:
    stop = int(model.generate(PROMPT, 4)[0, -1])
    said, state = model.generate(PROMPT, 12, stop_tokens=[stop], return_state=True)
    assert_states_match(state, model(said).state, tolerance=1e-12)


def test_a_rows_sample_depends_on_its_seed_and_not_on_its_neighbours(model: RamNetForCausalLM) -> None:
    prompts = torch.randint(V, (5, 4), generator=torch.Generator().manual_seed(1))
    length = DRAWN_AT_ONCE + 6
    together = model.generate(prompts, length, temperature=1.0, seed=3)
    for row in range(5):
        assert torch.equal(
            together[row : row + 1], model.generate(prompts[row : row + 1], length, temperature=1.0, seed=3 + row)
        )
    order = [4, 2, 0]
    again = model.generate(prompts[order], length, temperature=1.0, seed=[3 + row for row in order])
    assert torch.equal(again, together[order])
    same = model.generate(prompts[:1].expand(4, -1), 20, temperature=1.0, seed=0)
    assert len(same.unique(dim=0)) == 4, "rows of one prompt would all say the same"


def test_no_number_is_drawn_twice() -> None:
    uniforms = Uniforms([0, 1, 2], 3, torch.device("cpu"))
    drawn = torch.stack([uniforms() for _ in range(2 * DRAWN_AT_ONCE + 3)])
    assert bool((drawn >= 0).all()) and bool((drawn < 1).all())
    assert len(drawn.unique()) == drawn.numel()


@pytest.mark.parametrize("seed", [-(2**63), -1, 2**63, 2**64 - 1])
def test_every_seed_that_torch_takes_is_taken(model: RamNetForCausalLM, seed: int) -> None:
    rows = [model.generate(PROMPT, 9, temperature=1.0, seed=seed) for _ in range(2)]
    assert torch.equal(*rows)


PROMPTS = [[1, 2, 3], [4], torch.tensor([5, 6, 7]), torch.tensor([8, 9, 10, 0, 1], dtype=torch.int32), [9]]


def alone(model: RamNetForCausalLM, row: int, **options: object) -> Tensor:
    return model.generate(torch.as_tensor(PROMPTS[row]).long().unsqueeze(0), 8, **options)[0]


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_prompts_of_any_lengths_are_continued_as_each_alone(model: RamNetForCausalLM, temperature: float) -> None:
    model.__class__ = Watched
    said = model.generate(PROMPTS, 8, temperature=temperature, seed=5)
    read = [call[:2] for call in model.__dict__["calls"]]
    assert read == [(5, 5), *[(5, 1)] * 7], "all are read at once, and continued at once"
    for row, tokens in enumerate(said):
        assert torch.equal(tokens, alone(model, row, temperature=temperature, seed=5 + row))
    assert model.generate([], 8) == []


def test_a_long_prompt_has_no_short_one_padded_to_its_length(model: RamNetForCausalLM) -> None:
    prompts = [torch.randint(V, (length,)) for length in (2, 90, 1, 3, 40, 2)]
    expected = [model.generate(prompt.unsqueeze(0), 4, return_state=True) for prompt in prompts]
    model.__class__ = Watched
    said, states = model.generate(prompts, 4, return_state=True)
    read = [batch * tokens for batch, tokens, *_ in model.__dict__["calls"] if tokens > 1]
    assert sum(read) <= 2 * sum(map(len, prompts))
    more, _ = model.generate(prompts, 4, state=states, return_state=True)
    for row, (tokens, state) in enumerate(expected):
        assert torch.equal(said[row], tokens[0])
        assert_states_match(states[row], state, tolerance=1e-12)
        assert torch.equal(more[row], model.generate(prompts[row].unsqueeze(0), 4, state=state)[0])


@pytest.mark.parametrize("options", [{}, {"temperature": 1.0}, {"num_beams": 3}], ids=str)
def test_each_prompt_of_a_list_ends_where_it_stopped(model: RamNetForCausalLM, options: dict[str, Any]) -> None:
    def ends(stop: int) -> list[Tensor]:
        return [alone(model, row, seed=5 + row, stop_tokens=[stop], **options) for row in range(len(PROMPTS))]

    # A seed at which two prompts of one batch stop at different lengths.
    stop = next(stop for stop in range(V) if len(ends(stop)[0]) != len(ends(stop)[2]))
    said, states = model.generate(PROMPTS, 8, seed=5, stop_tokens=[stop], return_state=True, **options)
    for tokens, state, expected, prompt in zip(said, states, ends(stop), PROMPTS, strict=True):
        assert torch.equal(tokens, expected)
        assert_states_match(state, model(tokens.unsqueeze(0).long()).state, tolerance=1e-12)
        new = tokens[len(prompt) :].tolist()
        assert stop not in new[:-1] and (new[-1] == stop or len(new) == 8)


def test_each_prompt_of_a_list_has_a_state_to_go_on_from(model: RamNetForCausalLM) -> None:
    said, states = model.generate(PROMPTS, 3, return_state=True)
    more = model.generate([[row] for row in range(5)], 3, state=states)
    for row, (tokens, state) in enumerate(zip(said, states, strict=True)):
        assert_states_match(state, model(tokens.unsqueeze(0).long()).state, tolerance=1e-12)
        whole = torch.cat([tokens, torch.tensor([row])]).unsqueeze(0).long()
        assert torch.equal(model.generate(whole, 3)[0, len(tokens) :], more[row])


@pytest.mark.parametrize("several", [False, True])
def test_a_row_stops_once_its_new_text_holds_a_string(model: RamNetForCausalLM, several: bool) -> None:
    free = model.generate(PROMPT, 20, temperature=1.0, seed=2)
    texts = [spell(row) for row in free[:, 3:].tolist()]
    stop = [texts[0][4:7], "zz", texts[1][9:11]] if several else texts[0][4:7]
    said = model.generate(PROMPT, 20, temperature=1.0, seed=2, stop=stop, decode=spell)
    ended = 0
    for row, text in zip(said[:, 3:].tolist(), texts, strict=True):
        ends = [text.find(each) + len(each) for each in ([stop] if isinstance(stop, str) else stop) if each in text]
        end = min(ends, default=len(row))
        assert spell(row)[:end] == text[:end]
        assert set(row[end:]) <= {row[end - 1]}
        ended += end < 20
    assert ended == (2 if several else 1)


def test_a_string_that_the_prompt_ends_with_stops_nothing(model: RamNetForCausalLM) -> None:
    said = model.generate(PROMPT[:1], 4, stop=spell(PROMPT[0].tolist()), decode=spell)
    assert torch.equal(said, model.generate(PROMPT[:1], 4))


@pytest.fixture
def byte_model() -> RamNetForCausalLM:
    torch.manual_seed(0)
    return RamNetForCausalLM(RamNetConfig.preset("tiny", num_layers=2, embedding_std=1.0)).double()


@pytest.mark.parametrize("length", [1, 2, 3])
def test_where_tokens_are_bytes_strings_need_no_decoder(byte_model: RamNetForCausalLM, length: int) -> None:
    byte_model.head = torch.nn.Linear(128, 256, dtype=torch.float64)
    with torch.no_grad():  # only the three bytes that é and ê consist of, in any order
        byte_model.head.bias.fill_(-torch.inf)
        byte_model.head.bias[list("éê".encode())] = 0
    prompt = torch.tensor([list(b"a")])
    free = bytes(byte_model.generate(prompt, 200, temperature=1.0, seed=0)[0, 1:].tolist())
    stop = next(s for s in map("".join, product("éê", repeat=length)) if free.find(s.encode()) > 0)
    said = byte_model.generate(prompt, 200, temperature=1.0, seed=0, stop=["never", stop])[0, 1:].tolist()
    assert bytes(said) == free[: free.index(stop.encode()) + 2 * length]
