"""One workload's part of a tuning run: trials until the budget is spent. How a trial is made is for sub-classes."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from datetime import UTC, datetime
from time import perf_counter
from typing import TYPE_CHECKING, Any

from autotune.study import Study
from autotune.worker import FailedError
from lowering.fingerprint import fingerprint, versions
from schedules.base import Schedule
from schedules.kinds import kind
from schedules.records import How, Record
from schedules.workload import Workload

if TYPE_CHECKING:
    import optuna


@dataclass(frozen=True)
class Budget:
    """When a search ends: after ``seconds`` in all, or ``trials`` of each workload, or both."""

    seconds: float | None = 180.0
    trials: int | None = None

    def __post_init__(self) -> None:
        for name, value in (("budget", self.seconds), ("trials", self.trials)):
            if value is not None and not value > 0:
                raise ValueError(f"{name} is {value}; it must be above 0")


@dataclass(frozen=True)
class Progress:
    """Where a search is."""

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
    """What came out for a workload.

    ``over_eager`` is eager's time over the tuned one's, paired, and its spread; None where nothing was run.
    """

    record: Record
    over_eager: tuple[float, float] | None
    study: Study

    @property
    def is_default(self) -> bool:
        return self.record.schedule() == kind(self.record.workload.op, self.record.target).default(self.record.workload)


class Search:
    """Trials of one workload. ``prepare``, ``attempt`` and ``finish`` raise FailedError for what a schedule does."""

    how: How = "measured"

    def __init__(
        self, study: Study, target: str, seconds: float | None, trials: int | None,
        on_progress: Callable[[Progress], None],
    ) -> None:  # fmt: skip
        self.study, self.target = study, target
        self.seconds, self.trials, self.on_progress = seconds, trials, on_progress
        self.default = study.kind.default(study.workload)
        self.begin = perf_counter()

    def run(self, device: str) -> Result:
        """Search and choose. RuntimeError where the default itself comes to nothing."""
        self.report("starting")
        try:
            self.prepare()
        except FailedError as failure:
            raise RuntimeError(f"{self.study.workload.name}: the default schedule fails: {failure}") from None
        while self.goes_on():
            self.report("searching")
            found = self.study.next()
            if found is None:
                break
            trial, schedule = found
            try:
                self.attempt(trial, schedule)
            except FailedError as failure:
                self.study.fail(trial, failure.status, str(failure))
            except BaseException:
                self.study.interrupt(trial)
                raise
        return self.finish(device)

    def prepare(self) -> None:
        """Open the workload and try the default."""
        raise NotImplementedError

    def attempt(self, trial: optuna.Trial, schedule: Schedule) -> None:
        """Find the trial's gain over the default and tell the study."""
        raise NotImplementedError

    def finish(self, device: str) -> Result:
        """Choose among what the study holds."""
        raise NotImplementedError

    def record(self, winner: Schedule, device: str, **found: Any) -> Record:
        """The record of ``winner``; ``found`` are the times and gains."""
        return Record(
            workload=self.study.workload,
            target=self.target,
            device=device,
            knobs=winner.model_dump(),
            how=self.how,
            trials=self.study.summary().trials,
            fingerprint=fingerprint(self.study.workload.op, self.target, winner),
            versions=versions(self.target, winner),
            date=datetime.now(UTC).strftime("%Y-%m-%d"),
            **found,
        )

    def goes_on(self) -> bool:
        """Always for trial 0; then while there is a budget, less what the end needs."""
        trials = self.study.summary().trials
        in_time = self.seconds is None or perf_counter() - self.begin < self.seconds - self.reserve()
        return trials == 0 or (in_time and (self.trials is None or trials < self.trials))

    def reserve(self) -> float:
        """Seconds kept for ``finish``."""
        return 0.0

    def report(self, doing: str) -> None:
        summary = self.study.summary()
        most = min(len(self.study.valid), self.trials or len(self.study.valid))
        failures = sum(summary.failures.values())
        self.on_progress(
            Progress(self.study.workload, self.how, doing, summary.trials, most, summary.best, failures, None)
        )  # fmt: skip
