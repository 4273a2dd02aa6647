"""Finding the best schedule of each workload on this machine, within a budget."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from pathlib import Path
from time import perf_counter
from typing import TYPE_CHECKING

from autotune.measure import Timing, ratio
from autotune.measurer import Measures
from autotune.study import Sampler, Study
from autotune.worker import FailedError
from lowering import kernels, targets
from schedules import records
from schedules.base import Schedule
from schedules.kinds import kind
from schedules.records import Record, Time
from schedules.workload import Workload

if TYPE_CHECKING:
    import optuna

# Of a trial: candidate and default in turn.
ROUNDS, SECONDS = 15, 0.4
# Of the end: the finalists and the default in turn, then the winner, the default and eager PyTorch.
FINALISTS, FINAL_ROUNDS, FEWEST_FINAL_ROUNDS, FINAL_SECONDS = 3, 31, 15, 3.0


@dataclass(frozen=True)
class Budget:
    """When a search ends: after ``seconds`` in all, or ``trials`` measured of each workload, or both."""

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
    doing: str
    trials: int
    most_trials: int
    gain: float
    failures: int
    seconds_left: float | None  # of the whole run


@dataclass(frozen=True)
class Result:
    """What came out for a workload. ``over_eager`` is eager's time over the tuned one's, paired, and its spread."""

    record: Record
    over_eager: tuple[float, float]
    study: Study

    @property
    def is_default(self) -> bool:
        return self.record.schedule() == kind(self.record.workload.op, self.record.target).default(self.record.workload)


def tune(
    target: str,
    workloads: Sequence[Workload],
    measures: Measures,
    *,
    journal: Path,
    records_file: Path,
    budget: Budget,
    threads: int,
    sampler: Sampler = "tpe",
    seed: int = 0,
    on_progress: Callable[[Progress], None] = lambda progress: None,
) -> list[Result]:
    """Search each workload, compare with eager PyTorch, and merge the records when all went well.

    The time is shared out by the sizes of the searches; what one leaves goes to the next. Searches in ``journal``
    on the same device with as many threads and the same kernels go on where they stopped. The default stays unless
    another schedule was faster than it in three of four rounds of the final comparison.

    Raises:
        ValueError: for an unknown target, a file that is no journal or no record file.
        RuntimeError: where the default itself does not run or computes wrong numbers, or a finalist fails when it
            is measured anew.
        ImportError: for what is missing, with its install line.
    """
    known = records.load(records_file)
    device, name = targets.cpu_name(), targets.find(target).name
    identity = f"{device} | {threads} threads | {kernels.fingerprint()}"
    studies = [Study(journal, workload, name, identity, sampler, seed) for workload in workloads]
    begin, results = perf_counter(), []

    def in_all(progress: Progress) -> Progress:
        left = None if budget.seconds is None else max(0.0, budget.seconds - (perf_counter() - begin))
        return replace(progress, seconds_left=left)

    for i, study in enumerate(studies):
        share = None
        if budget.seconds is not None:
            left = budget.seconds - (perf_counter() - begin)
            sizes = [len(study.valid) ** 0.5 for study in studies[i:]]
            share = left * sizes[0] / sum(sizes)
        search = _Search(study, name, measures, share, budget.trials, lambda progress: on_progress(in_all(progress)))
        study.begin(*nearest(known, study.workload, device))
        results.append(search.run(device))
    records.merge(records_file, [result.record for result in results])
    return results


def nearest(known: Sequence[Record], workload: Workload, device: str) -> list[Schedule]:
    """What is known to be good for the same or the nearest workload, if anything: worth trying after the default."""
    same_op = [record for record in known if record.workload.op == workload.op]
    same_op.sort(key=lambda record: (workload.distance(record.workload), record.device != device))
    return [s for s in (record.schedule() for record in same_op) if s.refusal(workload) is None][:1]


def is_faster(default: Timing, candidate: Timing) -> bool:
    """Whether the lower quartile of the paired ratios is above 1: the candidate won three rounds of four.

    Equal ones do so by chance at most once in 187 times at 31 rounds, once in 17 at 15.
    """
    paired = [a / b for a, b in zip(default.samples, candidate.samples, strict=True)]
    return len(paired) > 1 and statistics.quantiles(paired, n=4, method="inclusive")[0] > 1.0


class _Search:
    """One workload's part of a tuning run."""

    def __init__(
        self, study: Study, target: str, measures: Measures, seconds: float | None, trials: int | None,
        on_progress: Callable[[Progress], None],
    ) -> None:  # fmt: skip
        self.study, self.target, self.measures = study, target, measures
        self.seconds, self.trials, self.on_progress = seconds, trials, on_progress
        self.default = study.kind.default(study.workload)
        self.begin = perf_counter()

    def run(self, device: str) -> Result:
        self.report("starting")
        try:
            self.measures.open(self.study.workload, self.target)
            self.measures.try_out(self.default)
        except FailedError as failure:
            raise RuntimeError(f"{self.study.workload.name}: the default schedule fails: {failure}") from None
        while self.goes_on():
            self.report("searching")
            found = self.study.next()
            if found is None:
                break
            trial, schedule = found
            try:
                self.measure(trial, schedule)
            except FailedError as failure:
                self.study.fail(trial, failure.status, str(failure))
            except BaseException:
                self.study.interrupt(trial)
                raise
        return self.finish(device)

    def goes_on(self) -> bool:
        """Always for trial 0; then while there is a budget, of which a third is kept for the end."""
        trials = self.study.summary().trials
        in_time = self.seconds is None or perf_counter() - self.begin < self.seconds - self.reserve()
        return trials == 0 or (in_time and (self.trials is None or trials < self.trials))

    def reserve(self) -> float:
        return 0.0 if self.seconds is None else min(self.seconds / 3, 3 * FINAL_SECONDS)

    def measure(self, trial: optuna.Trial, schedule: Schedule) -> None:
        self.measures.try_out(schedule)
        timings = self.measures.measure({"default": self.default, "candidate": schedule}, ROUNDS, SECONDS)
        gain = ratio(timings, of="default", over="candidate")
        self.study.succeed(
            trial, gain.median, gain_spread=gain.spread * gain.median, seconds=timings["candidate"].median,
            default_seconds=timings["default"].median, runs=timings["candidate"].runs,
        )  # fmt: skip

    def finish(self, device: str) -> Result:
        """Measure the finalists anew, choose, and compare with eager PyTorch."""
        self.report("comparing the finalists")
        winner, gain, spread = self.default, 1.0, 0.0
        finalists = {str(i): schedule for i, schedule in enumerate(self.study.best(FINALISTS))}
        seconds = FINAL_SECONDS if self.seconds is None else max(self.reserve() / 3, 0.3)
        if finalists:
            # A call that is not timed goes before each that is; neither sample is shorter than a millisecond.
            round_seconds = sum(2 * max(1e-3, self.study.seconds(s)) for s in (self.default, *finalists.values()))
            rounds = max(FEWEST_FINAL_ROUNDS, min(FINAL_ROUNDS, int(seconds / round_seconds)))
            timings = self.measures.measure(
                {"default": self.default, **finalists}, rounds, max(seconds, 3 * rounds * round_seconds)
            )  # fmt: skip
            best = min(finalists, key=lambda name: timings[name].median)
            if is_faster(timings["default"], timings[best]):
                found = ratio(timings, of="default", over=best)
                winner, gain, spread = finalists[best], found.median, found.spread * found.median
        self.report("comparing with eager PyTorch")
        timings = self.measures.measure(
            {"eager": None, "tuned": winner, "default": self.default}, FINAL_ROUNDS, seconds
        )  # fmt: skip
        over_eager = ratio(timings, of="eager", over="tuned")
        record = Record(
            workload=self.study.workload,
            target=self.target,
            device=device,
            knobs=winner.model_dump(),
            how="measured",
            gain=gain,
            gain_spread=spread,
            tuned=_time(timings["tuned"]),
            default=_time(timings["default"]),
            eager=_time(timings["eager"]),
            trials=self.study.summary().trials,
            fingerprint=kernels.fingerprint(),
            versions=kernels.versions(),
            date=datetime.now(UTC).strftime("%Y-%m-%d"),
        )
        return Result(record, (over_eager.median, over_eager.spread * over_eager.median), self.study)

    def report(self, doing: str) -> None:
        summary = self.study.summary()
        most = min(len(self.study.valid), self.trials or len(self.study.valid))
        failures = sum(summary.failures.values())
        self.on_progress(
            Progress(self.study.workload, doing, summary.trials, most, summary.best, failures, None)
        )  # fmt: skip


def _time(timing: Timing) -> Time:
    return Time(median=timing.median, spread=timing.spread * timing.median, runs=timing.runs)
