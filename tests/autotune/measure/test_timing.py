"""Interleaved measurement, by a clock that only the candidates move."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest

from autotune.measure.timing import Timing, interleaved, ratio, spread


class Time:
    """A clock that only ``busy`` candidates advance."""

    def __init__(self) -> None:
        self.now = 0.0

    def __call__(self) -> float:
        return self.now

    def busy(self, seconds: float) -> Callable[[], None]:
        def call() -> None:
            self.now += seconds

        return call


@pytest.fixture
def time(monkeypatch: pytest.MonkeyPatch) -> Time:
    time = Time()
    monkeypatch.setattr("autotune.measure.timing.perf_counter", time)
    return time


def test_a_candidate_of_twice_the_work_has_twice_the_time(time: Time) -> None:
    timings = interleaved({"one": time.busy(1e-3), "two": time.busy(2e-3)}, rounds=9, seconds=5)
    twice = ratio(timings, of="two", over="one")
    assert (twice.rounds, twice.median, twice.spread) == (9, pytest.approx(2), pytest.approx(0))
    assert timings["two"].samples == pytest.approx([2e-3] * 9)


def rounds_of(time: Time, names: str, **options: Any) -> list[tuple[str, ...]]:
    """The order of the candidates in each round, after each was warmed up once."""
    calls: list[str] = []
    candidates = {name: (lambda name=name: (calls.append(name), time.busy(25e-3)())) for name in names}
    interleaved(candidates, seconds=10, **options)
    assert calls[: len(names)] == list(names)
    return [tuple(calls[i : i + len(names)]) for i in range(len(names), len(calls), len(names))]


def test_every_candidate_runs_once_in_every_round_in_changing_order(time: Time) -> None:
    rounds = rounds_of(time, "abc", rounds=6, seed=3)
    assert len(rounds) == 6
    assert all(sorted(order) == ["a", "b", "c"] for order in rounds)
    assert len(set(rounds)) > 1


def test_the_seed_makes_the_order_repeatable(time: Time) -> None:
    first, same, other = (rounds_of(time, "abcd", rounds=3, seed=seed) for seed in (1, 1, 2))
    assert first == same != other


def test_a_sample_of_a_fast_candidate_fills_a_millisecond(time: Time) -> None:
    calls: list[None] = []
    work = time.busy(1e-5)
    timing = interleaved({"fast": lambda: (calls.append(None), work())}, rounds=3, seconds=1)["fast"]
    assert timing.samples == pytest.approx([1e-5] * 3)
    assert timing.runs / 3 >= 100, "calls of 10 µs in a sample"
    assert len(calls) < 1.5 * timing.runs, "and few beside them"


@pytest.mark.parametrize(("seconds", "warmed"), [(19e-3, 1), (21e-3, 0)])
def test_the_caches_are_filled_again_before_a_short_sample(time: Time, seconds: float, warmed: int) -> None:
    calls: list[None] = []
    work = time.busy(seconds)
    interleaved({"one": lambda: (calls.append(None), work())}, rounds=4, seconds=9)
    assert len(calls) == 1 + 4 * (1 + warmed)


def test_no_round_begins_after_the_time_but_three_are_made(time: Time) -> None:
    done: list[int] = []
    slow = {"slow": time.busy(1.0)}
    assert len(interleaved(slow, rounds=100, seconds=0, on_round=done.append)["slow"].samples) == 3
    assert done == [1, 2, 3]
    assert len(interleaved(slow, rounds=100, seconds=7.5)["slow"].samples) == 7, "the first call is before the rounds"
    assert [len(interleaved(slow, rounds=n, seconds=7.5)["slow"].samples) for n in (1, 2)] == [1, 2]


def test_ratios_are_paired_by_rounds() -> None:
    timings = {"a": Timing((1.0, 10.0, 3.0), 3), "b": Timing((1.0, 5.0, 1.0), 3)}
    assert timings["a"].median / timings["b"].median == 3.0
    assert ratio(timings, of="a", over="b").median == 2.0
    assert ratio(timings, of="b", over="a").median == 0.5


def test_the_spread_is_the_interquartile_range_over_the_median() -> None:
    assert spread([1.0, 2.0, 3.0, 4.0, 5.0]) == pytest.approx((4 - 2) / 3)
    assert spread([7.0]) == 0.0
    assert Timing((1.0, 2.0, 3.0, 4.0, 5.0), 5).spread == pytest.approx(2 / 3)


def test_exceptions_of_a_candidate_are_not_caught() -> None:
    with pytest.raises(ZeroDivisionError):
        interleaved({"bad": lambda: 1 / 0}, rounds=3, seconds=1)


@pytest.mark.parametrize(
    ("candidates", "rounds", "named"), [({}, 3, "candidates"), ({"a": math.sqrt}, 0, "rounds is 0")]
)
def test_no_candidates_are_refused(candidates: Any, rounds: int, named: str) -> None:
    with pytest.raises(ValueError, match=named):
        interleaved(candidates, rounds=rounds, seconds=1)
