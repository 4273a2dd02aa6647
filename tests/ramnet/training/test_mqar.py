"""The recall task, against its description in plain Python."""

import math
import random
from collections import Counter

import pytest
import torch

from ramnet import RamNetConfig, RamNetForCausalLM
from ramnet.training import mqar
from ramnet.training.mqar import Mqar

IGNORED = -100


def described_example(pairs: int, length: int, vocab_size: int, dice: random.Random) -> tuple[list[int], list[int]]:
    """One example, step by step as the task is described."""
    half = vocab_size // 2
    keys = dice.sample(range(1, half), pairs)
    values = dice.sample(range(half, vocab_size), pairs)
    tokens, labels = [0] * length, [IGNORED] * length
    for i in range(pairs):
        tokens[2 * i], tokens[2 * i + 1] = keys[i], values[i]
    places = list(range((length - 2 * pairs) // 2))
    for i in range(pairs):
        gap = dice.choices(places, [(place + 1) ** (0.01 - 1) for place in places])[0]
        places.remove(gap)
        at = 2 * pairs + 2 * gap
        tokens[at], labels[at] = keys[i], values[i]
    return [token or dice.randrange(vocab_size) for token in tokens], labels


def gap_of_each_key(tokens: list[int], labels: list[int], pairs: int, vocab_size: int) -> list[int]:
    """Check an example and return where each key is queried."""
    half, context = vocab_size // 2, 2 * pairs
    keys, values = tokens[0:context:2], tokens[1:context:2]
    assert len(set(keys)) == len(set(values)) == pairs
    assert all(1 <= key < half for key in keys)
    assert all(half <= value < vocab_size for value in values)
    assert all(0 <= token < vocab_size for token in tokens)
    asked = [at for at, label in enumerate(labels) if label != IGNORED]
    assert len(asked) == pairs
    assert all(at >= context and at % 2 == 0 for at in asked)
    assert [dict(zip(keys, values, strict=True))[tokens[at]] for at in asked] == [labels[at] for at in asked]
    place = {tokens[at]: (at - context) // 2 for at in asked}
    return [place[key] for key in keys]


@pytest.mark.parametrize(("pairs", "length", "vocab_size"), [(1, 4, 4), (2, 8, 6), (3, 14, 64), (8, 64, 8192)])
def test_every_example_is_as_described(pairs: int, length: int, vocab_size: int) -> None:
    inputs, labels = Mqar(pairs, length, vocab_size).batch(200, torch.Generator().manual_seed(0))
    assert inputs.dtype == labels.dtype == torch.int64
    assert inputs.shape == labels.shape == (200, length)
    for tokens, wanted in zip(inputs.tolist(), labels.tolist(), strict=True):
        gap_of_each_key(tokens, wanted, pairs, vocab_size)


def test_gaps_keys_and_noise_are_distributed_as_described() -> None:
    pairs, length, vocab_size, count = 3, 18, 12, 20_000
    inputs, labels = Mqar(pairs, length, vocab_size).batch(count, torch.Generator().manual_seed(1))
    dice = random.Random(2)
    drawn = list(zip(inputs.tolist(), labels.tolist(), strict=True))
    described = [described_example(pairs, length, vocab_size, dice) for _ in range(count)]
    for ours, theirs in zip(
        _frequencies(drawn, pairs, vocab_size), _frequencies(described, pairs, vocab_size), strict=True
    ):
        for event in ours | theirs:
            p = theirs[event] / count
            # Six standard deviations of the difference of two counts.
            assert abs(ours[event] - theirs[event]) <= 6 * (2 * count * max(p * (1 - p), 1 / count)) ** 0.5, event


def _frequencies(examples: list[tuple[list[int], list[int]]], pairs: int, vocab_size: int) -> list[Counter]:
    gaps: Counter = Counter()
    tokens_at: Counter = Counter()
    for tokens, labels in examples:
        gaps.update(enumerate(gap_of_each_key(tokens, labels, pairs, vocab_size)))
        tokens_at.update((at, token) for at, token in enumerate(tokens) if labels[at] == IGNORED)
    return [gaps, tokens_at]


def test_a_seed_repeats_the_data_and_another_does_not() -> None:
    task = Mqar(2, 8, 32)
    first, again, other = (task.batch(5, torch.Generator().manual_seed(seed))[0] for seed in (3, 3, 4))
    assert torch.equal(first, again)
    assert not torch.equal(first, other)


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
def test_the_accuracy_of_logits_that_are_not_finite_is_not_a_number(value: float) -> None:
    model = RamNetForCausalLM(RamNetConfig.preset("mqar", vocab_size=32, hidden_size=8))
    task = Mqar(2, 8, 32)
    assert 0 <= task.evaluate(model) <= 1
    model.norm.bias.data.fill_(value)
    assert math.isnan(task.evaluate(model))


@torch.no_grad()
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_right_answers_are_counted_exactly_in_every_dtype(dtype: torch.dtype) -> None:
    """257 is no number of bfloat16."""
    model = RamNetForCausalLM(RamNetConfig.preset("mqar", vocab_size=32, hidden_size=8)).to(dtype)
    hidden = torch.randn(1, 257, 8, generator=torch.Generator().manual_seed(0)).to(dtype)
    found = mqar.right(model, hidden, model.head(hidden).argmax(dim=-1))
    assert found.dtype == torch.float32 and float(found.sum()) == 257


@torch.no_grad()
def test_right_answers_are_the_same_however_many_logits_exist_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    torch.manual_seed(0)
    model = RamNetForCausalLM(RamNetConfig.preset("mqar", vocab_size=32, hidden_size=8))
    ids, labels = Mqar(2, 8, 32).batch(5, torch.Generator().manual_seed(0))
    hidden = model.hidden_states(ids)[0]
    labels[labels != IGNORED] = model.head(hidden).argmax(dim=-1)[labels != IGNORED]
    labels[3:] = labels[3:].where(labels[3:] == IGNORED, 0)
    expected = [float(i < 6) for i in range(10)]
    assert mqar.right(model, hidden, labels).tolist() == expected
    monkeypatch.setattr(mqar, "LOGITS_AT_ONCE", 3 * 32)
    assert mqar.right(model, hidden, labels).tolist() == expected


@pytest.mark.parametrize(
    ("setting", "message"),
    [
        ({"length": 63}, "length is 63; it must be even"),
        ({"pairs": 17}, "length is 64; 17 pairs and their queries need at least 68"),
        ({"pairs": 0}, "pairs is 0"),
        ({"vocab_size": 16}, "vocab_size is 16; 8 pairs need an even one of at least 18"),
        ({"vocab_size": 8191}, "vocab_size is 8191"),
    ],
)
def test_invalid_settings_are_named(setting: dict[str, int], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Mqar(**setting)
