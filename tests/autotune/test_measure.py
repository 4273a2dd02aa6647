"""Interleaved measurement."""

import math
from time import perf_counter

import pytest

from autotune.measure import Timing, interleaved, ratio, spread


def busy(seconds):
    """A candidate that computes, rather than sleeps, for this long."""

    def call():
        end = perf_counter() + seconds
        while perf_counter() < end:
            pass

    return call


def test_a_candidate_of_twice_the_work_has_twice_the_time():
    timings = interleaved({"one": busy(1e-3), "two": busy(2e-3)}, rounds=9, seconds=5)
    twice = ratio(timings, of="two", over="one")
    assert twice.rounds == 9
    assert twice.median == pytest.approx(2, rel=0.2)
    assert timings["two"].median == pytest.approx(2e-3, rel=0.2)


def test_every_candidate_runs_once_in_every_round_in_changing_order():
    calls = []
    candidates = {name: (lambda name=name: (calls.append(name), busy(25e-3)())) for name in "abc"}
    interleaved(candidates, rounds=6, seconds=10, seed=3)
    assert calls[:3] == ["a", "b", "c"], "each is warmed up once"
    rounds = [tuple(calls[i : i + 3]) for i in range(3, len(calls), 3)]
    assert len(rounds) == 6
    assert all(sorted(order) == ["a", "b", "c"] for order in rounds)
    assert len(set(rounds)) > 1


def test_the_seed_makes_the_order_repeatable():
    def order(seed):
        calls = []
        candidates = {name: (lambda name=name: (calls.append(name), busy(21e-3)())) for name in "abcd"}
        interleaved(candidates, rounds=3, seconds=10, seed=seed)
        return calls

    assert order(1) == order(1)
    assert order(1) != order(2)


def test_a_sample_of_a_fast_candidate_fills_a_millisecond():
    timing = interleaved({"fast": lambda: None}, rounds=3, seconds=1)["fast"]
    assert len(timing.samples) == 3
    assert timing.runs * max(timing.samples) >= 3e-3
    assert timing.median < 1e-5


def test_no_round_begins_after_the_time_but_three_are_made():
    done = []
    timings = interleaved({"slow": busy(30e-3)}, rounds=100, seconds=0, on_round=done.append)
    assert len(timings["slow"].samples) == 3
    assert done == [1, 2, 3]


def test_ratios_are_paired_by_rounds():
    timings = {"a": Timing((1.0, 10.0, 3.0), 3), "b": Timing((1.0, 5.0, 1.0), 3)}
    assert timings["a"].median / timings["b"].median == 3.0
    assert ratio(timings, of="a", over="b").median == 2.0
    assert ratio(timings, of="b", over="a").median == 0.5


def test_the_spread_is_the_interquartile_range_over_the_median():
    assert spread([1.0, 2.0, 3.0, 4.0, 5.0]) == pytest.approx((4 - 2) / 3)
    assert spread([7.0]) == 0.0
    assert Timing((1.0, 2.0, 3.0, 4.0, 5.0), 5).spread == pytest.approx(2 / 3)


def test_what_a_candidate_raises_passes_through():
    with pytest.raises(ZeroDivisionError):
        interleaved({"bad": lambda: 1 / 0}, rounds=3, seconds=1)


@pytest.mark.parametrize(
    ("candidates", "rounds", "named"), [({}, 3, "candidates"), ({"a": math.sqrt}, 0, "rounds is 0")]
)
def test_nothing_to_time_is_refused(candidates, rounds, named):
    with pytest.raises(ValueError, match=named):
        interleaved(candidates, rounds=rounds, seconds=1)
