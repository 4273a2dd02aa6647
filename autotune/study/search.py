"""The search for one workload: trials until the budget is used. Subclasses define trials."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from time import perf_counter
from typing import TYPE_CHECKING, Any

from autotune.study.study import Study, refused
from autotune.study.worker import FailedError, OutOfTimeError, Worker
from lowering.fingerprint import fingerprint, versions
from schedules.base import Schedule
from schedules.kinds import default_schedule
from schedules.records import How, Record
from schedules.workload import Workload

if TYPE_CHECKING:
    import optuna

# Failures that say nothing about a schedule: there was no compiler, or no time.
UNCOMPARED = ("no_compiler", "build_timeout", "run_timeout", "compile_timeout", "out_of_time")
# Of the time that a run has left, what a trial may take at most where its workload's own seconds are fewer.
LARGEST_TRIAL = 1 / 3
# Of what is kept for ``finish``, what it takes; the rest is for a trial that takes longer than most.
FINAL = 2 / 3
# Seconds past the end that the final comparison may take to begin a process anew, where a trial was killed.
GRACE = 30.0


@dataclass(frozen=True)
class Budget:
    """When a run ends: after ``seconds`` in all, ``trials`` of each workload, or whichever comes first."""

    seconds: float | None = 180.0
    trials: int | None = None

    def __post_init__(self) -> None:
        for name, value in (("budget", self.seconds), ("trials", self.trials)):
            if value is not None and not value > 0:
                raise ValueError(f"{name} is {value}; it must be above 0")


@dataclass(frozen=True)
class Progress:
    """The progress of a search."""

    workload: Workload
    how: How
    doing: str
    trials: int
    most_trials: int
    gain: float
    failures: int
    seconds_left: float | None  # of the whole run


@dataclass(frozen=True)
class Result:
    """The result for a workload.

    Attributes:
        over_eager: the ratio of eager's time to the tuned one's, and its spread; None if nothing was run, or eager
            took too long.
        compared: the schedules that the recorded one was compared with, including those that failed.
        kept: whether a known record is kept instead, because it could not be compared on this machine.
    """

    record: Record
    over_eager: tuple[float, float] | None
    study: Study
    compared: frozenset[Schedule] = frozenset()
    kept: bool = False

    @property
    def is_default(self) -> bool:
        return self.record.schedule() == default_schedule(self.record.workload, self.record.target)


class Search:
    """The trials of one workload. ``prepare``, ``try_out``, ``attempt`` and ``finish`` raise FailedError if a schedule
    fails.

    Args:
        worker: builds and runs schedules.
        seconds: the seconds of this workload.
        end: when the whole run ends, by ``perf_counter``.
        known: schedules that a record of the workload would replace. Each is tried, even with few trials; the first
            that works is ``standing``, which stays unless another one is better beyond the noise.
    """

    how: How = "measured"

    def __init__(
        self, study: Study, target: str, worker: Worker, seconds: float | None, trials: int | None,
        on_progress: Callable[[Progress], None], known: Sequence[Schedule] = (), end: float | None = None,
    ) -> None:  # fmt: skip
        self.worker, self.end = worker, end
        self.durations: list[float] = []  # seconds of the trials
        self.study, self.target, self.known = study, target, tuple(known)
        self.standing: Schedule | None = None
        self.seconds, self.trials, self.on_progress = seconds, trials, on_progress
        self.default = default_schedule(study.workload, target)
        self.begin = perf_counter()

    def run(self, device: str) -> Result:
        """Search and choose.

        Raises RuntimeError if the default schedule fails, and OutOfTimeError if the time is over before a result.
        """
        self.report("starting")
        self.worker.deadline = self.end
        try:
            self.prepare()
        except OutOfTimeError:
            raise
        except FailedError as failure:
            raise RuntimeError(f"{self.study.workload.name}: the default schedule fails: {failure}") from None
        while self.goes_on():
            self.report("searching")
            found = self.study.next()
            if found is None:
                break
            trial, schedule = found
            begin = perf_counter()
            self.worker.deadline = self.last_moment()
            try:
                self.attempt(trial, schedule)
            except OutOfTimeError as late:
                if schedule == self.default or perf_counter() >= (self.end or 0.0) - FINAL * self.reserve():
                    self.study.interrupt(trial)
                    break
                self.study.fail(trial, late.status, str(late))  # it took more than its part of what was left
            except FailedError as failure:
                self.study.fail(trial, failure.status, str(failure))
            except BaseException:
                self.study.interrupt(trial)
                raise
            self.durations.append(perf_counter() - begin)
        self.worker.deadline = None if self.end is None else max(self.end, perf_counter() + GRACE)
        tried = self.compare_known()
        result = self.finish(device)
        finished = [s for s, t in self.study.finished().items() if t.user_attrs["status"] not in UNCOMPARED]
        return replace(result, compared=frozenset({*finished, self.default, *tried}))

    def compare_known(self) -> list[Schedule]:
        """Try the ``known`` schedules that are not trials of the study. Returns all that were tried."""
        tried = []
        for schedule in self.known:
            trial = self.study.finished().get(schedule)
            status = "ok" if trial is None else trial.user_attrs["status"]
            if trial is None:
                if refused(schedule, self.study.workload, self.target) is not None:
                    status = "refused" if schedule.refusal(self.study.workload) else "no_compiler"
                else:
                    try:
                        self.try_out(schedule)
                    except FailedError as failure:
                        status = failure.status
            if status not in UNCOMPARED:
                tried.append(schedule)
            if status == "ok" and self.standing is None:
                self.standing = schedule
        return tried

    def prepare(self) -> None:
        """Open the workload and try the default."""
        raise NotImplementedError

    def try_out(self, schedule: Schedule) -> None:
        """Build and check a schedule."""
        raise NotImplementedError

    def attempt(self, trial: optuna.Trial, schedule: Schedule) -> None:
        """Determine the trial's gain over the default and report it to the study."""
        raise NotImplementedError

    def finish(self, device: str) -> Result:
        """Choose among the trials of the study."""
        raise NotImplementedError

    def record(self, winner: Schedule, device: str, **found: Any) -> Record:
        """Return the record of ``winner``; ``found`` are the times and gains."""
        return Record(
            workload=self.study.workload,
            target=self.target,
            device=device,
            knobs=winner.model_dump(),
            how=self.how,
            trials=self.study.summary().trials,
            fingerprint=fingerprint(self.study.workload.op, self.target, winner, how=self.how),
            versions=versions(self.target, winner),
            date=datetime.now(UTC).strftime("%Y-%m-%d"),
            **found,
        )

    def goes_on(self) -> bool:
        """Return whether to continue: always for trial 0 and the known schedules, then while a trial of typical length
        fits in the budget minus the reserve."""
        trials = self.study.summary().trials
        usual = statistics.median(self.durations) if self.durations else 0.0
        kept = max(self.reserve(), FINAL * self.reserve() + usual)
        in_time = self.seconds is None or perf_counter() - self.begin < self.seconds - kept
        if trials == 0 or (in_time and (self.trials is None or trials < self.trials)):
            return True
        return in_time and not {*self.known}.isdisjoint(self.study.untried())

    def last_moment(self) -> float | None:
        """Return when a trial that begins now is killed, so that the run ends in time and other trials get some."""
        if self.end is None or self.seconds is None:
            return None
        now = perf_counter()
        own = self.begin + self.seconds
        return min(self.end, max(own, now + LARGEST_TRIAL * (self.end - now))) - FINAL * self.reserve()

    def reserve(self) -> float:
        """Return the seconds reserved for ``finish``."""
        return 0.0

    def report(self, doing: str) -> None:
        summary = self.study.summary()
        most = min(len(self.study.valid), self.trials or len(self.study.valid))
        failures = sum(summary.failures.values())
        self.on_progress(
            Progress(self.study.workload, self.how, doing, summary.trials, most, summary.best, failures, None)
        )  # fmt: skip
