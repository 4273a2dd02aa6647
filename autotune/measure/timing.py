"""Comparing the speed of things on a machine that is never quiet.

Candidates are timed in turn within a round, so that what slows the machine for a while slows all of them alike, and
are compared by the ratios within the rounds.
"""

from __future__ import annotations

import math
import random
import statistics
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from time import perf_counter
from typing import Protocol

# A sample shorter than this says more about the clock and the interpreter than about the candidate.
SHORTEST_SAMPLE = 1e-3
# Below this, a call that is not timed goes before each sample, so that the candidate's data are in the caches again.
WORTH_REWARMING = 20e-3
# Fewer have no spread to speak of; a run that is out of time makes them all the same.
FEWEST_ROUNDS = 3


@dataclass(frozen=True)
class Timing:
    """What one candidate took: ``samples`` in seconds a call, one sample a round, and ``runs``, the calls in them."""

    samples: tuple[float, ...]
    runs: int

    @property
    def median(self) -> float:
        """Seconds a call."""
        return statistics.median(self.samples)

    @property
    def spread(self) -> float:
        """Interquartile range over the median."""
        return spread(self.samples)


class Clock(Protocol):
    """What tells how long calls take."""

    def seconds(self, call: Callable[[], object], repeats: int) -> float:
        """Of ``repeats`` calls together, when all that they began is done."""


class HostClock:
    """The processor's: calls one after another, done when they return."""

    def seconds(self, call: Callable[[], object], repeats: int) -> float:
        begin = perf_counter()
        for _ in range(repeats):
            call()
        return perf_counter() - begin


@dataclass(frozen=True)
class Ratio:
    """How many times longer one candidate takes than another: the median over rounds, and its spread."""

    median: float
    spread: float
    rounds: int


def interleaved(
    candidates: Mapping[str, Callable[[], object]],
    rounds: int,
    seconds: float,
    *,
    seed: int = 0,
    on_round: Callable[[int], None] | None = None,
    clock: Clock | None = None,
) -> dict[str, Timing]:
    """Time ``candidates`` in turn, in an order shuffled anew in every round.

    Each is called once before the first round. A sample of a fast one is the mean of as many calls as fill a
    millisecond.

    Args:
        rounds: at most this many, each with one sample of every candidate.
        seconds: no round begins after this time, but the first three (or ``rounds``) are always made.
        seed: of the order.
        on_round: called with the number of rounds done, after each.
        clock: times the calls; the host's where it is None.

    Returns:
        The timings, under the candidates' names. Sample i of each stems from round i.

    Raises:
        ValueError: where there is nothing to time. What a candidate raises passes through.
    """
    if not candidates:
        raise ValueError("candidates is empty; there must be something to time")
    if rounds < 1:
        raise ValueError(f"rounds is {rounds}; it must be at least 1")
    begin = perf_counter()
    shuffle = random.Random(seed).shuffle
    clock = clock or HostClock()
    samplers = {name: _Sampler(call, clock) for name, call in candidates.items()}
    order = list(samplers.values())
    for done in range(rounds):
        if done >= FEWEST_ROUNDS and perf_counter() - begin > seconds:
            break
        shuffle(order)
        for sampler in order:
            sampler.sample()
        if on_round is not None:
            on_round(done + 1)
    return {name: Timing(tuple(sampler.samples), sampler.runs) for name, sampler in samplers.items()}


def ratio(timings: dict[str, Timing], of: str, over: str) -> Ratio:
    """The time of the candidate ``of`` over that of ``over``, paired by rounds: above 1 where ``over`` is faster."""
    paired = [a / b for a, b in zip(timings[of].samples, timings[over].samples, strict=True)]
    return Ratio(statistics.median(paired), spread(paired), len(paired))


def spread(samples: Sequence[float]) -> float:
    """Interquartile range over the median; 0 for a single sample."""
    if len(samples) < 2:
        return 0.0
    low, _, high = statistics.quantiles(samples, n=4, method="inclusive")
    return (high - low) / statistics.median(samples)


class _Sampler:
    """Takes the samples of one candidate, which it calls once when it is made."""

    def __init__(self, call: Callable[[], object], clock: Clock) -> None:
        self.call, self.clock = call, clock
        self.repeats = 1
        self.samples: list[float] = []
        self.runs = 0
        self.latest = clock.seconds(call, 1)

    def sample(self) -> None:
        if self.latest < WORTH_REWARMING:
            self.call()
        while (seconds := self.clock.seconds(self.call, self.repeats)) < SHORTEST_SAMPLE:
            self.repeats = math.ceil(self.repeats * 1.2 * SHORTEST_SAMPLE / max(seconds, 1e-6))
        self.latest = seconds / self.repeats
        self.samples.append(self.latest)
        self.runs += self.repeats
