"""A search that runs candidates: each alternately with the default, then the finalists again, then eager PyTorch."""

from __future__ import annotations

import statistics
from time import perf_counter
from typing import TYPE_CHECKING

from autotune.measure.timing import Timing, ratio
from autotune.study.search import Result, Search
from autotune.study.worker import FailedError, OutOfTimeError
from schedules.base import Schedule
from schedules.records import Time

if TYPE_CHECKING:
    import optuna

# Rounds of a trial, with candidate and default in turn.
ROUNDS, SECONDS = 15, 0.4
# Rounds of the end: the finalists and the default in turn, then the winner, the default and eager PyTorch.
FINALISTS, FINAL_ROUNDS, FEWEST_FINAL_ROUNDS, FINAL_SECONDS = 3, 31, 15, 3.0


def is_faster(default: Timing, candidate: Timing) -> bool:
    """Return whether the lower quartile of the paired ratios is above 1, so that the candidate won 3 of 4 rounds.

    The probability for equal candidates is at most 1/187 with 31 rounds, and 1/17 with 15.
    """
    paired = [a / b for a, b in zip(default.samples, candidate.samples, strict=True)]
    return len(paired) > 1 and statistics.quantiles(paired, n=4, method="inclusive")[0] > 1.0


class EmpiricalSearch(Search):
    """Trials are built, checked and timed in a process that can be killed."""

    def prepare(self) -> None:
        self.worker.open(self.study.workload, self.target)
        self.worker.try_out(self.default)

    def reserve(self) -> float:
        """Return the seconds reserved for ``finish``, at most a third of all."""
        return 0.0 if self.seconds is None else min(self.seconds / 3, 3 * FINAL_SECONDS)

    def try_out(self, schedule: Schedule) -> None:
        self.worker.try_out(schedule)

    def attempt(self, trial: optuna.Trial, schedule: Schedule) -> None:
        self.try_out(schedule)
        timings = self.worker.measure({"default": self.default, "candidate": schedule}, ROUNDS, SECONDS)
        gain = ratio(timings, of="default", over="candidate")
        self.study.succeed(
            trial, gain.median, gain_spread=gain.spread * gain.median, seconds=timings["candidate"].median,
            default_seconds=timings["default"].median, runs=timings["candidate"].runs,
        )  # fmt: skip

    def finish(self, device: str) -> Result:
        """Measure the finalists again, choose, and compare with eager PyTorch. The standing schedule, or the default,
        stays unless another one is faster."""
        self.report("comparing the finalists")
        standing = self.standing or self.default
        winner, gain, spread = self.default, 1.0, 0.0
        others = dict.fromkeys([s for s in (standing, *self.study.best(FINALISTS)) if s != self.default])
        finalists = {str(i): schedule for i, schedule in enumerate(others)}
        seconds = FINAL_SECONDS if self.seconds is None else max(self.reserve() / 3, 0.3)
        if finalists:
            # A call that is not timed goes before each that is; neither sample is shorter than a millisecond.
            round_seconds = sum(2 * max(1e-3, self.study.seconds(s)) for s in (self.default, *finalists.values()))
            rounds = max(FEWEST_FINAL_ROUNDS, min(FINAL_ROUNDS, int(seconds / round_seconds)))
            granted = max(seconds, 3 * rounds * round_seconds)
            if self.end is not None:
                granted = min(granted, max(0.0, self.end - perf_counter()))
            timings = self.worker.measure({"default": self.default, **finalists}, rounds, granted)
            named = {"default": self.default, **finalists}
            stays = next(name for name, schedule in named.items() if schedule == standing)
            best = min(named, key=lambda name: timings[name].median)
            enough = len(timings[best].samples) >= FEWEST_FINAL_ROUNDS  # fewer, where time is short, tell too little
            chosen = best if enough and is_faster(timings[stays], timings[best]) else stays
            if chosen != "default":
                found = ratio(timings, of="default", over=chosen)
                winner, gain, spread = named[chosen], found.median, found.spread * found.median
        self.report("comparing with eager PyTorch")
        compared: dict[str, Schedule | None] = {"eager": None, "tuned": winner, "default": self.default}
        try:
            timings = self.worker.measure(compared, FINAL_ROUNDS, seconds)
        except FailedError as error:
            if error.status != "run_timeout" and not (finalists and isinstance(error, OutOfTimeError)):
                raise
            # Eager PyTorch, which may take thousands of times as long, is too slow for the time that there is.
            if finalists:
                timings = {"tuned": timings[chosen], "default": timings["default"]}
            else:
                del compared["eager"]
                timings = self.worker.measure(compared, FINAL_ROUNDS, seconds)
        over_eager, eager = None, None
        if "eager" in timings:
            found = ratio(timings, of="eager", over="tuned")
            over_eager, eager = (found.median, found.spread * found.median), _time(timings["eager"])
        record = self.record(
            winner, device, gain=gain, gain_spread=spread, tuned=_time(timings["tuned"]),
            default=_time(timings["default"]), eager=eager,
        )  # fmt: skip
        return Result(record, over_eager, self.study)


def _time(timing: Timing) -> Time:
    return Time(median=timing.median, spread=timing.spread * timing.median, runs=timing.runs)
