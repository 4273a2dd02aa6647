"""Comparing speeds on a machine with other load.

Candidates are timed in turn within rounds and compared by ratios within the rounds, so that temporary load affects all
of them alike.
"""

from __future__ import annotations

import math
import random
import statistics
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from time import perf_counter
from typing import Protocol

# The shortest sample; a shorter one would be dominated by the overhead of the clock and the interpreter.
SHORTEST_SAMPLE = 1e-3
# For faster candidates, an untimed call precedes each sample to load the caches.
WORTH_REWARMING = 20e-3
# The fewest rounds, which are run even if the time is over, since fewer give no spread.
FEWEST_ROUNDS = 3


@dataclass(frozen=True)
class Timing:
    """The times of a candidate: ``samples``, seconds per call, one for each round, of ``runs`` calls in all."""

    samples: tuple[float, ...]
    runs: int

    @property
    def median(self) -> float:
        """Seconds per call."""
        return statistics.median(self.samples)

    @property
    def spread(self) -> float:
        """The interquartile range divided by the median."""
        return spread(self.samples)


class Clock(Protocol):
    """Times calls."""

    def seconds(self, call: Callable[[], object], repeats: int) -> float:
        """Return the seconds of ``repeats`` calls until all their work is finished."""


class HostClock:
    """Times calls on the CPU, which are finished when they return."""

    def seconds(self, call: Callable[[], object], repeats: int) -> float:
        begin = perf_counter()
        for _ in range(repeats):
            call()
        return perf_counter() - begin


@dataclass(frozen=True)
class Ratio:
    """The ratio of two candidates' times in each round."""

    paired: tuple[float, ...]

    @property
    def median(self) -> float:
        return statistics.median(self.paired)

    @property
    def spread(self) -> float:
        """The interquartile range divided by the median."""
        return spread(self.paired)

    @property
    def rounds(self) -> int:
        return len(self.paired)


def interleaved(
    candidates: Mapping[str, Callable[[], object]],
    rounds: int,
    seconds: float,
    *,
    seed: int = 0,
    on_round: Callable[[int], None] | None = None,
    clock: Clock | None = None,
) -> dict[str, Timing]:
    """Time ``candidates`` in turn, in an order that is shuffled in every round.

    Each is called once before the first round. A sample of a fast candidate is the mean of as many calls as take a
    millisecond.

    Args:
        rounds: the most rounds, each with one sample of every candidate.
        seconds: no round begins after this time, except the first three (or ``rounds``).
        seed: the seed of the order.
        on_round: called with the number of finished rounds after each.
        clock: times the calls; None uses the host's.

    Returns:
        The timings by the candidates' names. Sample i of each is from round i.

    Raises:
        ValueError: if there are no candidates. Exceptions of candidates are not caught.
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
    """Return the time of ``of`` divided by that of ``over``, paired by rounds; above 1 if ``over`` is faster."""
    return Ratio(tuple(a / b for a, b in zip(timings[of].samples, timings[over].samples, strict=True)))


def spread(samples: Sequence[float]) -> float:
    """Return the interquartile range divided by the median; 0 for a single sample."""
    if len(samples) < 2:
        return 0.0
    low, _, high = statistics.quantiles(samples, n=4, method="inclusive")
    return (high - low) / statistics.median(samples)


class _Sampler:
    """Takes samples of one candidate, after an initial call."""

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
