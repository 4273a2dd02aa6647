"""Beam search against all continuations of a small vocabulary, and against a search that rereads all tokens."""

from __future__ import annotations

from itertools import product

import pytest
import torch

from ramnet import RamNetConfig, RamNetForCausalLM

V, NEW = 4, 4
PROMPT = torch.tensor([[1, 2, 3], [3, 0, 0]])


@pytest.fixture
def model() -> RamNetForCausalLM:
    torch.manual_seed(4)
    return RamNetForCausalLM(RamNetConfig(
        vocab_size=V, hidden_size=12, num_layers=2, num_heads=2, value_dim=5, order=3, sub_dim=3, top_k=4,
        cape_full_layers=1, conv_layers=1, embedding_std=1.0,
    )).double().eval()  # fmt: skip


def log_probability(model: RamNetForCausalLM, prompt: list[int], said: list[int], penalty: float = 1.0) -> float:
    """Of ``said`` after ``prompt``, each token in turn, those seen before it penalised."""
    total = 0.0
    for at, logits in enumerate(model(torch.tensor([prompt + said])).logits[0, len(prompt) - 1 : -1]):
        for token in {*prompt, *said[:at]}:
            logits[token] = logits[token] / penalty if logits[token] > 0 else logits[token] * penalty
        total += float(logits.log_softmax(-1)[said[at]])
    return total


def cut(said: tuple[int, ...], stop: int | None) -> tuple[int, ...]:
    return said[: said.index(stop) + 1] if stop in said else said


@pytest.mark.parametrize("stop", [None, 0, 1, 2, 3])
@torch.no_grad()
def test_enough_beams_find_the_most_probable_continuation(model: RamNetForCausalLM, stop: int | None) -> None:
    stops = [] if stop is None else [stop]
    found = model.generate(PROMPT, NEW, num_beams=V ** (NEW - 1), stop_tokens=stops)
    greedy = model.generate(PROMPT, NEW, stop_tokens=stops)
    for row, prompt in enumerate(PROMPT.tolist()):
        every = {cut(said, stop) for said in product(range(V), repeat=NEW)}
        best = max(every, key=lambda said: log_probability(model, prompt, list(said)))
        said = found[row, 3:].tolist()
        assert tuple(said[: len(best)]) == best
        assert set(said[len(best) :]) <= {best[-1]}
    if stop is None:
        assert not torch.equal(found, greedy), "a greedy search would do"


def plain_search(model: RamNetForCausalLM, prompt: list[int], beams: int, stop: str, penalty: float) -> list[int]:
    """Score every hypothesis again from its first token."""

    def ended(said: list[int]) -> bool:
        return stop in "".join(map(str, said))

    kept: list[list[int]] = [[]]
    for _ in range(8):
        nexts = [[*said, token] for said in kept if not ended(said) for token in range(V)]
        nexts += [said for said in kept if ended(said)]
        kept = sorted(nexts, key=lambda said: -log_probability(model, prompt, said, penalty))[:beams]
    return kept[0]


@pytest.mark.parametrize(
    ("beams", "stop", "penalty"), [(2, "x", 1.0), (3, "13", 1.0), (7, "22", 1.0), (3, "x", 2.0), (7, "30", 3.0)]
)
@torch.no_grad()
def test_a_few_beams_find_what_a_plain_search_finds(
    kernels: str, model: RamNetForCausalLM, beams: int, stop: str, penalty: float
) -> None:
    found, state = model.generate(
        PROMPT, 8, num_beams=beams, stop=stop, decode=lambda ids: "".join(map(str, ids)), return_state=True,
        repetition_penalty=penalty,
    )  # fmt: skip
    best = [plain_search(model, prompt, beams, stop, penalty) for prompt in PROMPT.tolist()]
    for row, expected in zip(found[:, 3:].tolist(), best, strict=True):
        assert row[: len(expected)] == expected
    assert found.shape[1] == 3 + max(map(len, best))
    expected = model(found).state.tensors()
    assert all(torch.allclose(x, expected[name]) for name, x in state.tensors().items())


def test_one_beam_is_greedy(model: RamNetForCausalLM) -> None:
    assert torch.equal(model.generate(PROMPT, 9, num_beams=1), model.generate(PROMPT, 9))


def test_logits_that_are_not_finite_are_refused_by_the_row_of_the_prompt(model: RamNetForCausalLM) -> None:
    class Broken(RamNetForCausalLM):
        def forward(self, *arguments: object, **named: object) -> object:
            out = super().forward(*arguments, **named)
            if len(out.logits) > 2:
                out.logits[4] = float("nan")  # the second beam of the second row
            return out

    model.__class__ = Broken
    with pytest.raises(RuntimeError, match="the largest logit of row 1 is NaN or infinite"):
        model.generate(PROMPT, 5, num_beams=3)
