"""Sampling: greedy, temperature, top-k, top-p, stop tokens, seeds."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from ramnet import RamNetConfig, RamNetForCausalLM
from ramnet.generation.options import TOKENS_AT_ONCE
from ramnet.generation.sampling import Sampling, Uniforms
from tests.samples import LargestTensor, relative_rmse

V = 11
LOGITS = torch.tensor([2.0, 1.5, 1.0, 0.5, 0.0, -0.5, -1.0, -1.5, -2.0, -2.5, -30.0])[torch.tensor(
    [3, 0, 7, 10, 1, 5, 2, 9, 8, 4, 6]
)]  # fmt: skip


@pytest.fixture
def model() -> RamNetForCausalLM:
    torch.manual_seed(0)
    return RamNetForCausalLM(RamNetConfig(
        vocab_size=V, hidden_size=12, num_layers=2, num_heads=[2, 3], value_dim=[5, 4], order=[3, 2], sub_dim=[3, 4],
        top_k=[4, 5], cape_full_layers=1, conv_layers=1, embedding_std=1.0,
    )).double().eval()  # fmt: skip


PROMPT = torch.tensor([[1, 2, 3], [4, 5, 6]])


def test_greedy_takes_the_argmax_of_a_full_forward_at_each_step(kernels: str, model: RamNetForCausalLM) -> None:
    said = model.generate(PROMPT, 20)
    assert said.shape == (2, 23) and said.dtype == torch.int64
    assert torch.equal(said[:, :3], PROMPT)
    expected = PROMPT
    for _ in range(20):
        expected = torch.cat([expected, model(expected).logits[:, -1:].argmax(-1)], dim=1)
    assert torch.equal(said, expected)
    assert len(said[0, 3:].unique()) > 2, "a constant would prove little"


@pytest.mark.parametrize("penalty", [30.0, 0.3])
def test_a_repetition_penalty_is_the_plain_definition(model: RamNetForCausalLM, penalty: float) -> None:
    text = PROMPT[0].tolist()
    for _ in range(15):
        logits = model(torch.tensor([text])).logits[0, -1].tolist()
        for token in set(text):
            logits[token] = logits[token] / penalty if logits[token] > 0 else logits[token] * penalty
        text.append(max(range(V), key=logits.__getitem__))
    said = model.generate(PROMPT, 15, repetition_penalty=penalty)[0].tolist()
    assert said == text != model.generate(PROMPT, 15)[0].tolist()


def test_a_seed_repeats_and_another_differs(model: RamNetForCausalLM) -> None:
    first, again, other = (model.generate(PROMPT, 30, temperature=1.0, seed=seed) for seed in (1, 1, 2))
    assert torch.equal(first, again) and not torch.equal(first, other)
    torch.manual_seed(5)
    free = model.generate(PROMPT, 30, temperature=1.0)
    torch.manual_seed(5)
    assert torch.equal(free, model.generate(PROMPT, 30, temperature=1.0))


def plain_probabilities(temperature: float, top_k: int, top_p: float, min_p: float) -> Tensor:
    """Add tokens from the most probable until there are k, they hold p, or the next one is too improbable."""
    order = LOGITS.argsort(descending=True)[: top_k or V].tolist()
    probability = torch.zeros(V, dtype=torch.float64)
    probability[order] = (LOGITS[order].double() / temperature).softmax(0)
    kept, held = [], 0.0
    for token in order:
        if held >= top_p or probability[token] < min_p * probability.max():
            break
        kept.append(token)
        held += float(probability[token])
    result = torch.zeros(V, dtype=torch.float64)
    result[kept] = probability[kept] / probability[kept].sum()
    return result


@pytest.mark.parametrize(
    ("temperature", "top_k", "top_p", "min_p"),
    [(1.0, 0, 1.0, 0.0), (0.7, 0, 1.0, 0.0), (1.0, 3, 1.0, 0.0), (1.0, 1, 1.0, 0.0), (1.0, 99, 1.0, 0.0),
     (1.0, 0, 0.8, 0.0), (2.0, 0, 0.5, 0.0), (1.0, 0, 1e-6, 0.0), (1.5, 5, 0.7, 0.0), (1.0, 0, 1.0, 0.2),
     (2.0, 0, 1.0, 0.2), (1.0, 0, 1.0, 1.0), (1.5, 5, 0.9, 0.5)],
)  # fmt: skip
def test_samples_follow_the_plain_definition(temperature: float, top_k: int, top_p: float, min_p: float) -> None:
    draws = 20_000
    uniforms = Uniforms(range(draws), draws, LOGITS.device)
    counts = (
        Sampling(temperature, top_k, top_p, min_p)
        .choose(LOGITS.expand(draws, V), uniforms)
        .bincount(minlength=V)
        .double()
    )
    expected = plain_probabilities(temperature, top_k, top_p, min_p)
    assert bool((counts[expected == 0] == 0).all()), "a token outside the bounds was drawn"
    # Allow five standard deviations of a binomial count.
    deviation = (draws * expected * (1 - expected)).sqrt()
    assert bool(((counts - draws * expected).abs() <= 5 * deviation + 1e-9).all())


@pytest.mark.parametrize("temperature", [1e-3, 1e-30, 1e-300])
def test_a_tiny_temperature_is_greedy(temperature: float) -> None:
    logits = 1e4 * torch.randn(50, V, generator=torch.Generator().manual_seed(0))
    assert torch.equal(Sampling(temperature).choose(logits, Uniforms([0] * 50, 50, logits.device)), logits.argmax(-1))


def test_a_row_that_stopped_repeats_its_stop_token(model: RamNetForCausalLM) -> None:
    free = model.generate(PROMPT, 30, temperature=1.0, seed=3)
    stop = int(free[0, 5])
    said = model.generate(PROMPT, 30, temperature=1.0, seed=3, stop_tokens=[stop])
    ended = 0
    for row, unstopped in zip(said[:, 3:].tolist(), free[:, 3:].tolist(), strict=True):
        at = row.index(stop) if stop in row else len(row)
        assert row[: at + 1] == unstopped[: at + 1]
        assert all(token == stop for token in row[at:])
        ended += at < len(row)
    assert ended >= 1


def test_ends_when_every_row_has_stopped(model: RamNetForCausalLM) -> None:
    for stops in (range(V), (token for token in range(V))):
        assert model.generate(PROMPT, 30, stop_tokens=stops).shape == (2, 4)


def test_a_stop_token_in_the_prompt_stops_nothing(model: RamNetForCausalLM) -> None:
    free = model.generate(PROMPT[:1], 5)
    unsaid = (set(range(V)) - set(free[0, 3:].tolist())).pop()
    prompt = torch.cat([torch.tensor([[unsaid]]), PROMPT[:1]], dim=1)
    assert model.generate(prompt, 5, stop_tokens=[unsaid]).shape[1] > prompt.shape[1] + 1


def test_the_streamer_gets_every_new_column(model: RamNetForCausalLM) -> None:
    columns: list[Tensor] = []
    said = model.generate(PROMPT, 7, streamer=columns.append)
    assert torch.equal(torch.stack(columns, 1), said[:, 3:])


def test_no_new_tokens_return_the_prompt(model: RamNetForCausalLM) -> None:
    assert torch.equal(model.generate(PROMPT, 0), PROMPT)


class Watched(RamNetForCausalLM):
    """Record the sizes of the inputs and outputs of each call."""

    def forward(self, input_ids: Tensor, *arguments: Any, **named: Any) -> Any:
        out = super().forward(input_ids, *arguments, **named)
        self.__dict__.setdefault("calls", []).append((*input_ids.shape, out.logits.shape[1]))
        self.__dict__["last"] = out
        return out


@pytest.mark.parametrize(
    ("batch", "length", "longest"), [(1, 23, 8), (3, 23, 2), (3, 9, 2), (8, 5, 1), (20, 5, 1), (1, 8, 8), (1, 1, 1)]
)
def test_a_prompt_is_read_in_chunks_of_bounded_size(
    model: RamNetForCausalLM, monkeypatch: pytest.MonkeyPatch, batch: int, length: int, longest: int
) -> None:
    monkeypatch.setattr("ramnet.generation.reading.TOKENS_AT_ONCE", 8)
    prompt = torch.randint(V, (batch, length), generator=torch.Generator().manual_seed(2))
    model.__class__ = Watched
    said = model.generate(prompt, 3)
    calls = [call for call in model.__dict__["calls"] if call[1] > 0]
    assert all(rows == batch and kept == 1 for rows, _, kept in calls)
    parts = [tokens for _, tokens, _ in calls[:-2]]
    assert sum(parts) == length and max(parts) == longest and max(parts) - min(parts) <= 1
    whole = RamNetForCausalLM.forward(model, said[:, :-1])
    assert relative_rmse(model.__dict__["last"].logits[:, 0], whole.logits[:, -1]) <= 1e-12
    assert torch.equal(said[:, -3:], whole.logits[:, -3:].argmax(-1))


def test_activations_do_not_grow_with_the_prompt(model: RamNetForCausalLM) -> None:
    """Measured by the elements of the largest tensor that any operator creates."""
    largest: dict[int, int] = {}
    for length in (TOKENS_AT_ONCE, 4 * TOKENS_AT_ONCE):
        with LargestTensor() as seen:
            model.generate(torch.zeros(1, length, dtype=torch.int64), 1)
        largest[length] = seen.numbers
    small, large = largest.values()
    assert large <= small + 4 * TOKENS_AT_ONCE  # the prompt itself


def _broken(model: RamNetForCausalLM, row: int, value: float, at: int) -> RamNetForCausalLM:
    """The model, whose row ``row`` has ``value`` among its logits at its ``at``-th call, as +inf, or in all of them."""

    class Broken(RamNetForCausalLM):
        def forward(self, *arguments: Any, **named: Any) -> Any:
            out = super().forward(*arguments, **named)
            self.__dict__["calls"] = self.__dict__.get("calls", 0) + 1
            if self.__dict__["calls"] == at:
                out.logits[row, -1, 4 if value != -torch.inf else slice(None)] = value
            return out

    model.__class__ = Broken
    return model


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("temperature", [0.0, 0.8])
@pytest.mark.parametrize("waits", [True, False], ids=["looked at each time", "looked at in the end"])
def test_no_token_is_chosen_from_logits_that_are_not_finite(
    model: RamNetForCausalLM, monkeypatch: pytest.MonkeyPatch, value: float, temperature: float, waits: bool
) -> None:
    monkeypatch.setattr("ramnet.generation.sampled.SYNCHRONOUS", ("cpu",) if waits else ())
    broken = _broken(model, 1, value, at=3)
    with pytest.raises(RuntimeError, match="the largest logit of row 1 is NaN or infinite") as caught:
        broken.generate(PROMPT, 6, temperature=temperature, top_k=3, top_p=0.9, seed=0)
    assert "\n" not in str(caught.value)
    assert broken.__dict__["calls"] == (3 if waits else 6)


@pytest.mark.parametrize("reader", ["streamer", "stop_tokens"])
def test_no_token_of_such_logits_is_given_to_the_streamer(
    model: RamNetForCausalLM, monkeypatch: pytest.MonkeyPatch, reader: str
) -> None:
    monkeypatch.setattr("ramnet.generation.sampled.SYNCHRONOUS", ())
    columns: list[Tensor] = []
    settings: dict[str, Any] = {"streamer": columns.append} if reader == "streamer" else {"stop_tokens": [V]}
    broken = _broken(model, 0, float("nan"), at=3)
    with pytest.raises(RuntimeError, match="the largest logit of row 0"):
        broken.generate(PROMPT, 6, **settings)
    assert broken.__dict__["calls"] == 3
    assert len(columns) == (2 if reader == "streamer" else 0)


def test_logits_of_minus_infinity_exclude_tokens(model: RamNetForCausalLM) -> None:
    model.head = torch.nn.Linear(12, V, dtype=torch.float64)
    with torch.no_grad():
        model.head.bias[2:] = -torch.inf
    for temperature in (0.0, 1.0):
        assert set(model.generate(PROMPT, 20, temperature=temperature, seed=0)[:, 3:].flatten().tolist()) <= {0, 1}


def test_generation_leaves_no_graph(model: RamNetForCausalLM) -> None:
    assert not model.generate(PROMPT, 2).requires_grad
    assert torch.is_grad_enabled()


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"temperature": -1.0}, r"temperature is -1\.0; it must be finite and >= 0"),
        ({"temperature": float("nan")}, "temperature is nan; it must be finite and >= 0"),
        ({"top_k": -1}, "top_k is -1; it must be >= 0"),
        ({"top_p": 0.0}, r"top_p is 0\.0; it must be in \(0, 1\]"),
        ({"top_p": 1.1}, r"top_p is 1\.1; it must be in \(0, 1\]"),
        ({"min_p": -0.1}, r"min_p is -0\.1; it must be in \[0, 1\]"),
        ({"repetition_penalty": 0}, r"repetition_penalty is 0; it must be in \[0\.001, 1000\]"),
        ({"repetition_penalty": float("inf")}, r"repetition_penalty is inf; it must be in \[0\.001, 1000\]"),
        ({"num_beams": 0}, "num_beams is 0; it must be >= 1"),
        ({"num_beams": 2, "temperature": 0.8}, r"temperature is 0\.8 but num_beams is 2; beams do not sample: use 0"),
        ({"num_beams": 2, "streamer": print}, "streamer is given; it works with neither"),
        ({"input_ids": [PROMPT[0]], "streamer": print}, "streamer is given; it works with neither"),
        ({"stop": ["x", ""]}, "stop is ''; it must hold at least one character"),
        ({"stop": "\ud800", "decode": str}, r"stop is '\\ud800'; it must be text, which UTF-8 can encode"),
        ({"stop": "x"}, "stop is 'x' but the model has 11 tokens, which are not bytes; give decode"),
        ({"stop_tokens": [-1]}, "stop_tokens is -1; it must be token ids"),
        ({"seed": 2**64}, r"seed is 18446744073709551616; it must be from -2\*\*63 to 2\*\*64 - 1"),
        ({"seed": [1, 2, 3]}, "seed holds 3 numbers for 2 prompts; give one for each"),
        ({"input_ids": [[1], []]}, r"input_ids has shape \[1, 0\]; .* T >= 1"),
        ({"input_ids": [[1], [11]]}, r"input_ids holds 11; token ids must be in 0\.\.10"),
        ({"input_ids": [[1], [2]], "state": []}, "state must be a list of 2 states of one row"),
        ({"max_new_tokens": -1}, "max_new_tokens is -1; it must be >= 0"),
        ({"input_ids": torch.zeros(2, 0, dtype=torch.int64)}, r"input_ids has shape \[2, 0\]; .* T >= 1"),
        ({"input_ids": torch.zeros(0, 2, dtype=torch.int64)}, r"input_ids has shape \[0, 2\]; .* B and T >= 1"),
        ({"input_ids": PROMPT[0]}, r"input_ids has shape \[3\]"),
        ({"input_ids": PROMPT + 5}, r"input_ids holds 11; token ids must be in 0\.\.10"),
        ({"input_ids": PROMPT - 2}, r"input_ids holds -1; token ids must be in 0\.\.10"),
    ],
)
def test_bad_settings_are_refused_before_the_model_runs(
    model: RamNetForCausalLM, settings: dict[str, Any], message: str
) -> None:
    model.__class__ = Watched
    with pytest.raises(ValueError, match=message):
        model.generate(**{"input_ids": PROMPT, "max_new_tokens": 3, **settings})
    assert "calls" not in model.__dict__


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"input_ids": PROMPT.float()}, r"input_ids is torch\.float32; it must be torch\.int64"),
        ({"input_ids": [1, 2]}, "input_ids holds 1; a list must hold prompts"),
        ({"input_ids": [["a"]]}, "a prompt holds 'a'; it must hold token ids"),
        ({"input_ids": [[1, 2**70]]}, f"a prompt holds {2**70}; it must hold token ids"),
        ({"input_ids": [[1], [2]], "state": [None, None]}, r"state\[0\] is None; each prompt needs a state"),
        ({"state": 5}, "state is a int; it must be a RamState"),
        ({"stop": None}, "stop is None; it must be a string or several"),
        ({"stop": b"a"}, "stop is b'a'; it must be a string or several"),
        ({"input_ids": [[1.5]]}, r"input_ids is torch\.float32; it must be torch\.int64"),
        ({"temperature": "hot"}, "temperature is 'hot'; it must be finite and >= 0"),
        ({"top_k": 2.5}, r"top_k is 2\.5; it must be >= 0"),
        ({"max_new_tokens": None}, "max_new_tokens is None; it must be >= 0"),
        ({"num_beams": True}, "num_beams is True; it must be >= 1"),
        ({"stop": [b"x"]}, "stop is b'x'; it must be a string or several"),
        ({"stop_tokens": ["x"]}, "stop_tokens is 'x'; it must be token ids"),
        ({"stop_tokens": 5}, r"stop_tokens is 5; it must be token ids, such as \[5\]"),
        ({"seed": 1.5}, r"seed is 1\.5; it must be from"),
    ],
)
def test_settings_of_other_types_are_refused(model: RamNetForCausalLM, settings: dict[str, Any], message: str) -> None:
    with pytest.raises(TypeError, match=message):
        model.generate(**{"input_ids": PROMPT, "max_new_tokens": 3, **settings})
