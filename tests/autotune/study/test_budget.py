"""How a tuning run spends its seconds, with a simulated clock, and how it evaluates samples."""

from __future__ import annotations

import statistics
from pathlib import Path
from typing import Any

import pytest

from autotune import report
from autotune.measure.timing import Timing
from autotune.study.empirical_search import FEWEST_FINAL_ROUNDS, FINAL_ROUNDS, FINALISTS
from autotune.study.search import Budget, Progress, Result
from autotune.study.shares import shares
from autotune.study.study import every_schedule
from autotune.study.tuner import tune
from autotune.study.worker import FailedError, OutOfTimeError
from schedules import records
from schedules.base import Schedule
from schedules.cpu import AddressDecodeBackward, MemoryStep
from schedules.workload import Workload

pytest.importorskip("optuna", reason="tuning needs optuna: pip install 'ramnet[tune]'")

CONSTANTS = {"decay_power": 1.0, "eps": 1e-6}
MANY = Workload(op="memory_step", shape={"N": 4, "K": 8, "M": 256, "D": 32}, constants=CONSTANTS)
FEW = Workload(op="address_decode_backward", shape={"R": 512, "U": 2, "P": 4, "K": 4})
DEFAULT = MemoryStep.default(MANY)
OTHERS = [schedule for schedule in every_schedule(MANY, "cpu") if schedule != DEFAULT]


class Timed:
    """Simulates ``seconds_a_call`` of each schedule and advances the clock by a second per build and its times."""

    longest_trial = 123.0

    def __init__(self, monkeypatch: pytest.MonkeyPatch, seconds_a_call: float = 1e-5) -> None:
        self.now, self.seconds_a_call = 0.0, seconds_a_call
        self.asked: list[tuple[set[str], int, float]] = []
        self.opened: dict[str, float] = {}
        for module in ("empirical_search", "search", "tuner"):
            monkeypatch.setattr(f"autotune.study.{module}.perf_counter", lambda: self.now)

    def open(self, workload: Workload, target: str) -> None:
        self.workload = workload
        self.opened[workload.op] = self.now

    def try_out(self, schedule: Schedule) -> None:
        assert schedule.refusal(self.workload) is None
        self.now += 1

    def measure(self, candidates: dict[str, Schedule | None], rounds: int, seconds: float) -> dict[str, Timing]:
        self.asked.append(({*candidates}, rounds, seconds))
        self.now += min(seconds, rounds * 0.1)
        return {name: Timing(self.samples(name, schedule, rounds), rounds) for name, schedule in candidates.items()}

    def samples(self, name: str, schedule: Schedule | None, rounds: int) -> tuple[float, ...]:
        return (self.seconds_a_call,) * rounds


def run(folder: Path, worker: Any, budget: Budget, *workloads: Workload, **options: Any) -> list[Result]:
    return tune(
        "cpu", workloads or [MANY], worker, journal=folder / "journal.log", records_file=folder / "records.jsonl",
        budget=budget, threads=1, **options,
    )  # fmt: skip


@pytest.mark.parametrize("seconds", [12.0, 60.0])
def test_a_search_ends_within_its_seconds_and_uses_them(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, seconds: float
) -> None:
    timed = Timed(monkeypatch)
    shown: list[Progress] = []
    (result,) = run(tmp_path, timed, Budget(seconds), on_progress=shown.append)
    assert 0.75 * seconds < timed.now <= seconds
    assert result.record.trials < len(OTHERS)
    left = [progress.seconds_left for progress in shown]
    assert left == sorted(left, reverse=True) and left[0] == seconds
    assert {progress.most_trials for progress in shown} == {len(OTHERS) + 1}


def test_the_reserve_is_at_most_a_third_and_nine_seconds_of_a_long_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for seconds, kept in ((6.0, 2.0), (60.0, 9.0)):
        folder = tmp_path / str(seconds)
        timed = Timed(monkeypatch)
        searched = []

        def note(progress: Progress, searched: list[float] = searched, timed: Timed = timed) -> None:
            if progress.doing == "comparing the finalists":
                searched.append(timed.now)

        run(folder, timed, Budget(seconds), on_progress=note)
        assert seconds - kept - 1.5 < searched[0] <= seconds - 2 / 3 * kept, "no trial is begun that ends too late"
        assert [asked[2] for asked in timed.asked[-2:]] == [pytest.approx(kept / 3)] * 2


def test_without_seconds_all_are_tried_and_the_end_takes_three_and_three(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    timed = Timed(monkeypatch)
    shown: list[Progress] = []
    (result,) = run(tmp_path, timed, Budget(None, None), FEW, on_progress=shown.append)
    assert result.record.trials == len(every_schedule(FEW, "cpu"))
    assert [asked[2] for asked in timed.asked[-2:]] == [3.0, 3.0]
    assert {progress.seconds_left for progress in shown} == {None}


def test_trials_bound_a_search_with_seconds_left(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    shown: list[Progress] = []
    (result,) = run(tmp_path, Timed(monkeypatch), Budget(1000.0, 5), on_progress=shown.append)
    assert result.record.trials == 5
    assert {progress.most_trials for progress in shown} == {5}


def test_seconds_are_distributed_by_the_models_time_and_unused_ones_are_passed_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    timed = Timed(monkeypatch)
    run(tmp_path / "first", timed, Budget(100.0), MANY, FEW)
    share = 100 * shares([MANY, FEW], [])[0]
    assert share == 50, "one of a token, one of a sequence"
    assert share - 9 < timed.opened[FEW.op] <= share
    called = Timed(monkeypatch)
    run(tmp_path / "called", called, Budget(100.0), MANY, FEW, calls={MANY.name: 9, FEW.name: 1})
    assert called.opened[FEW.op] > 80
    other_way = Timed(monkeypatch)
    run(tmp_path / "second", other_way, Budget(100.0), FEW, MANY)
    assert other_way.opened[MANY.op] < 20 < 85 < other_way.now <= 100, "all of the few were tried before their time"


def test_shares_are_of_recorded_times_else_of_guesses(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    scan = Workload(op="memory_scan", shape={"N": 4, "T": 512, "K": 8, "M": 256, "D": 32}, constants=CONSTANTS)
    backward = scan.model_copy(update={"op": "memory_scan_backward"})
    parts = dict(zip(("step", "rows", "scan", "back"), shares([MANY, FEW, scan, backward], []), strict=True))
    assert sum(parts.values()) == pytest.approx(1)
    assert parts["step"] == pytest.approx(0.5), "the one that is of a token"
    assert parts["back"] > 4 * parts["scan"] > 4 * parts["rows"]
    (result,) = run(tmp_path, Timed(monkeypatch, seconds_a_call=1.0), Budget(None, 1), FEW)
    recorded = shares([MANY, FEW, scan, backward], [result.record])
    assert recorded[1] > 0.45, "a call takes a second"


def test_the_largest_share_is_searched_first_and_results_are_in_the_requested_order(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls = {MANY.name: 1, FEW.name: 5}
    timed = Timed(monkeypatch)
    found = run(tmp_path / "seconds", timed, Budget(60.0), MANY, FEW, calls=calls)
    assert [*timed.opened] == [FEW.op, MANY.op]
    assert [result.record.workload for result in found] == [MANY, FEW]
    timed = Timed(monkeypatch)
    run(tmp_path / "trials", timed, Budget(None, 1), MANY, FEW, calls=calls)
    assert [*timed.opened] == [MANY.op, FEW.op]


class Slow(Timed):
    """Each build takes 20 s, and is killed at the deadline."""

    deadline: float | None = None

    def try_out(self, schedule: Schedule) -> None:
        self._take(20.0, "build")

    def measure(self, candidates: dict[str, Schedule | None], rounds: int, seconds: float) -> dict[str, Timing]:
        self._take(min(seconds, rounds * 0.1), "measure")
        return {name: Timing(self.samples(name, schedule, rounds), rounds) for name, schedule in candidates.items()}

    def _take(self, seconds: float, doing: str) -> None:
        end = self.now + seconds
        if self.deadline is not None and end > self.deadline:
            self.now = max(self.now, self.deadline)
            raise OutOfTimeError(doing)
        self.now = end


@pytest.mark.parametrize("seconds", [30.0, 60.0, 100.0])
def test_slow_builds_do_not_make_a_run_longer_than_its_seconds_and_a_trial(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, seconds: float
) -> None:
    slow = Slow(monkeypatch)
    others = [MANY.model_copy(update={"shape": {**MANY.shape, "M": slots}}) for slots in (512, 1024, 2048, 4096)]
    wanted = [MANY, FEW, *others]
    results = run(tmp_path, slow, Budget(seconds), *wanted)
    assert slow.now <= seconds + 20
    done = [result.record.workload for result in results]
    notes = report.notes(results, wanted)
    assert 0 < len(done) < len(wanted), "each default alone takes 20 s"
    assert notes == [f"{w.name}: no result, as the time was over" for w in wanted if w not in done]
    assert [record.workload for record in records.load(tmp_path / "records.jsonl")] == sorted(
        done, key=lambda workload: workload.name
    )


def test_a_trial_interrupted_by_the_end_is_not_a_failure_and_is_tried_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Late(Slow):
        def try_out(self, schedule: Schedule) -> None:
            self._take(1.0 if schedule == DEFAULT else 1000.0, "build")

    late = Late(monkeypatch)
    (result,) = run(tmp_path, late, Budget(60.0))
    assert late.now <= 60
    assert result.is_default and not result.study.summary().failures
    assert result.study.summary().statuses["interrupted"] > 0
    (again,) = run(tmp_path, Timed(monkeypatch), Budget(None, 2))
    cut = next(t for t in again.study.optuna.get_trials() if t.user_attrs.get("status") == "interrupted")
    assert again.study.space.schedule(cut.params) in again.study.finished()


def test_a_run_without_time_tries_nothing_and_records_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    slow = Slow(monkeypatch)
    slow.now = 100.0
    assert run(tmp_path, slow, Budget(60.0), begin=0.0) == []
    assert not slow.opened and not (tmp_path / "records.jsonl").exists()


@pytest.mark.parametrize(
    ("seconds_a_call", "rounds", "seconds"),
    [(1e-5, FINAL_ROUNDS, 3.0), (0.02, 18, 3 * 18 * 0.16), (1.0, FEWEST_FINAL_ROUNDS, 3 * FEWEST_FINAL_ROUNDS * 8)],
)
def test_the_finalists_have_as_many_rounds_as_fit_but_enough_to_tell(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, seconds_a_call: float, rounds: int, seconds: float
) -> None:
    """A round of the default and three finalists, each preceded by an untimed call."""
    timed = Timed(monkeypatch, seconds_a_call)
    run(tmp_path, timed, Budget(None, 6))
    finalists, last = timed.asked[-2:]
    assert finalists[0] == {"default", *map(str, range(FINALISTS))}
    assert finalists[1:] == (rounds, pytest.approx(seconds))
    assert last[:2] == ({"eager", "tuned", "default"}, FINAL_ROUNDS)


FIRST, SECOND = [s for s in every_schedule(FEW, "cpu") if s != AddressDecodeBackward.default(FEW)][:2]


class Uneven(Timed):
    """The first by the trials is second in the end; samples differ from round to round, but the default's."""

    def samples(self, name: str, schedule: Schedule | None, rounds: int) -> tuple[float, ...]:
        if schedule is None:
            return tuple(1e-3 * (1 + 0.1 * (i % 4)) for i in range(rounds))
        at_the_end = len(self.asked[-1][0]) > 2
        gain = {FIRST: 1.2, SECOND: 1.3} if at_the_end else {FIRST: 1.5, SECOND: 1.4}
        wobble = 0.0 if name == "default" else 0.05
        return tuple(1e-5 / gain.get(schedule, 1.0) * (1 + wobble * (i % 3)) for i in range(rounds))


def test_the_winner_of_the_end_is_recorded_with_medians_and_spreads_in_seconds(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def spread(values: list[float]) -> float:
        low, _, high = statistics.quantiles(values, n=4, method="inclusive")
        return high - low

    (result,) = run(tmp_path, Uneven(monkeypatch), Budget(None, None), FEW)
    (record,) = records.load(tmp_path / "records.jsonl")
    assert record.schedule() == SECOND == result.study.best(2)[1]
    gains = [1.3 / (1 + 0.05 * (i % 3)) for i in range(FINAL_ROUNDS)]
    assert record.gain == pytest.approx(statistics.median(gains))
    assert record.gain_spread == pytest.approx(spread(gains))
    tuned = [1e-5 / gain for gain in gains]
    assert (record.tuned.median, record.tuned.spread) == pytest.approx((statistics.median(tuned), spread(tuned)))
    assert (record.default.median, record.default.spread, record.default.runs) == (1e-5, 0.0, FINAL_ROUNDS)
    eager = [1e-3 * (1 + 0.1 * (i % 4)) for i in range(FINAL_ROUNDS)]
    over_eager = [a / b for a, b in zip(eager, tuned, strict=True)]
    assert result.over_eager == pytest.approx((statistics.median(over_eager), spread(over_eager)))
    trial = result.study.finished()[FIRST]
    gains = [1.5 / (1 + 0.05 * (i % 3)) for i in range(15)]
    assert trial.value == pytest.approx(statistics.median(gains))
    assert trial.user_attrs["gain_spread"] == pytest.approx(spread(gains))
    assert trial.user_attrs["default_seconds"] == 1e-5
    assert trial.user_attrs["runs"] == 15


@pytest.mark.parametrize("others", [True, False])
def test_eager_pytorch_that_takes_too_long_is_left_out(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, others: bool
) -> None:
    class Slow(Timed):
        def measure(self, candidates: dict[str, Schedule | None], rounds: int, seconds: float) -> dict[str, Timing]:
            if "eager" in candidates:
                raise FailedError("run_timeout", "measure took longer than 33 s")
            return super().measure(candidates, rounds, seconds)

    (result,) = run(tmp_path, Slow(monkeypatch), Budget(None, 3 if others else 1))
    assert result.study.seconds_a_trial == Slow.longest_trial
    (record,) = records.load(tmp_path / "records.jsonl")
    assert record.eager is None and result.over_eager is None and record.tuned.median == pytest.approx(1e-5)
