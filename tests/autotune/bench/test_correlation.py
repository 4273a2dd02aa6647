"""Rank correlation between modelled and measured times."""

from __future__ import annotations

import sys
from functools import partial
from typing import Any

import pytest
from click.testing import CliRunner

from autotune.bench.correlation import (
    BATCH,
    FEWEST,
    Correlation,
    Pair,
    correlate,
    correlation,
    rank_correlation,
    spearman,
)  # fmt: skip
from autotune.measure.gpu_runner import GpuRunner
from autotune.measure.timing import Timing
from autotune.model import cpu as time_model_cpu
from autotune.model.prediction import Prediction, Predictor
from autotune.study.study import every_schedule
from autotune.study.worker import FailedError
from lowering import targets
from schedules.base import Schedule
from schedules.cpu import MemoryStep
from schedules.workload import Workload
from tests.autotune.faulty import Synthetic

WORKLOAD = Workload(
    op="memory_step", shape={"N": 2, "K": 2, "M": 16, "D": 8}, constants={"decay_power": 1.0, "eps": 1e-6}
)
SCHEDULE = MemoryStep.default(WORKLOAD)


def pairs(modelled: list[float], measured: list[float], halves: list[tuple[float, float]] | None = None) -> list[Pair]:
    agreeing = [(m, m) for m in measured]
    return [Pair(SCHEDULE, *each) for each in zip(modelled, measured, halves or agreeing, strict=True)]


def test_only_the_order_counts() -> None:
    assert spearman([1, 2, 3, 4], [1, 10, 100, 1000]) == pytest.approx(1.0)
    assert spearman([1, 2, 3, 4], [4, 3, 2, 1]) == pytest.approx(-1.0)
    # 1 − 6 Σ d² / (n (n² − 1)) with d = 1, 1, 0, 0.
    assert spearman([1, 2, 3, 4], [2, 1, 3, 4]) == pytest.approx(1 - 6 * 2 / (4 * 15))


def test_equal_values_share_their_rank() -> None:
    assert spearman([1, 1, 2, 2], [1, 2, 3, 4]) == pytest.approx(0.8944, abs=1e-4)
    # Ranks 1, 1, 1, 3, 4.5, 4.5 and 0 to 5, about their means of 2.5: 15 / √(15 · 17.5).
    assert spearman([1, 1, 1, 2, 3, 3], [1, 2, 3, 4, 5, 6]) == pytest.approx(15 / (15 * 17.5) ** 0.5)
    assert spearman([1, 1, 1], [1, 2, 3]) == spearman([1, 2, 3], [1, 1, 1]) == 0.0


def test_a_model_that_predicts_the_order_has_a_rho() -> None:
    found = correlate(pairs([1, 2, 3, 4, 5], [2, 4, 6, 8, 10]))
    assert found.rho == pytest.approx(1.0)
    assert str(found) == "1.00 (5 schedules; two halves of the rounds agree to 1.00)"


def test_schedules_within_noise_have_none() -> None:
    found = correlate(pairs([1, 2, 3, 4, 5], [1.0, 1.01, 1.02, 1.03, 1.04]))
    assert found.rho is None
    assert "no order to tell: the schedules are 1.04× apart" in str(found)


def test_outliers_of_a_tenth_at_each_end_do_not_make_an_order() -> None:
    measured = [0.1, 0.1, *(1 + 0.005 * i for i in range(16)), 9.0, 9.0]
    found = correlate(pairs([float(i) for i in range(20)], measured))
    assert found.rho is None and "1.07× apart" in str(found)
    assert correlate(pairs([float(i) for i in range(20)], [1.1 ** (i / 15) for i in range(20)])).rho == pytest.approx(1)


def test_rounds_that_disagree_on_the_order_give_no_rho() -> None:
    halves = [(1.0, 5.0), (2.0, 4.0), (3.0, 3.0), (4.0, 2.0), (5.0, 1.0)]
    found = correlate(pairs([1, 2, 3, 4, 5], [1, 2, 3, 4, 5], halves))
    assert found.rho is None
    assert "two halves of the rounds agree to -1.00" in str(found)


def test_too_few_schedules_give_no_rho() -> None:
    few = FEWEST - 1
    assert correlate(pairs([1.0] * few, [1.0] * few)).reason == f"fewer than {FEWEST} schedules ran"


def test_a_gpu_that_is_not_here_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("lowering.targets.here", lambda: None)
    with pytest.raises(ValueError, match="h200 is not here; there is no GPU"):
        rank_correlation("h200", WORKLOAD.model_copy(update={"dtype": "bfloat16"}), 1.0)


class Here(Synthetic):
    """A fake worker in this process: a schedule's gain is its unroll, and every second round takes twice as long."""

    def __init__(self, threads: int) -> None:
        super().__init__(lambda schedule: schedule.unroll)
        self.threads, self.measured = threads, []

    def __enter__(self) -> Here:
        made.append(self)
        return self

    def __exit__(self, *_: object) -> None:
        pass

    def try_out(self, schedule: Schedule) -> None:
        if schedule == FAILS:
            raise FailedError("crash", "signal 11")
        super().try_out(schedule)

    def measure(self, candidates: Any, rounds: int, seconds: float) -> Any:
        self.measured.append(len(candidates))
        return {
            name: Timing(tuple((1 + i % 2 * (name != "default")) / schedule.unroll for i in range(rounds)), rounds)
            for name, schedule in candidates.items()
        }


made: list[Here] = []
OTHERS = [schedule for schedule in every_schedule(WORKLOAD, "cpu") if schedule != SCHEDULE]
FAILS = OTHERS[0]


@pytest.fixture
def here(monkeypatch: pytest.MonkeyPatch) -> None:
    made.clear()
    monkeypatch.setattr("autotune.model.cpu.bandwidth", lambda level, threads=1: 1e10)
    monkeypatch.setattr("autotune.bench.correlation.Worker", Here)


def test_on_the_cpu_schedules_are_modelled_and_measured_over_the_default(here: None) -> None:
    found = rank_correlation("cpu", WORKLOAD, 1e9, threads=3)
    (worker,) = made
    assert worker.threads == 3
    assert {pair.schedule for pair in found.pairs} == {*OTHERS} - {FAILS}, "all but the one that fails"
    assert max(worker.measured) == BATCH + 1, "the default is timed beside each batch"
    model = partial(time_model_cpu.seconds, WORKLOAD, machine=time_model_cpu.this_machine(3))
    for pair in found.pairs:
        assert pair.modelled == pytest.approx(model(pair.schedule) / model(SCHEDULE))
        over_default = SCHEDULE.unroll / pair.schedule.unroll
        assert (pair.measured, *pair.halves) == pytest.approx((over_default, over_default, 2 * over_default))


def test_out_of_time_one_batch_is_measured(here: None) -> None:
    assert BATCH - 1 <= len(rank_correlation("cpu", WORKLOAD, 0.0).pairs) <= BATCH < len(OTHERS) - 1


def test_a_default_that_fails_is_an_error(here: None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys.modules[__name__], "FAILS", SCHEDULE)
    with pytest.raises(RuntimeError, match="the default schedule fails: signal 11"):
        rank_correlation("cpu", WORKLOAD, 1.0)


def test_for_a_gpu_one_worker_models_and_another_measures(monkeypatch: pytest.MonkeyPatch) -> None:
    class Worker(Here):
        def __init__(self, threads: int, makes: type) -> None:
            super().__init__(threads)
            self.makes, self.predicted = makes, 0

        def predict(self, schedule: Schedule) -> Prediction:
            self.predicted += 1
            return Prediction(1.0, (), ())

        def measure(self, candidates: Any, rounds: int, seconds: float) -> Any:
            return Synthetic(lambda schedule: 1.0).measure(candidates, rounds, seconds)

    made.clear()
    monkeypatch.setattr("autotune.bench.correlation.Worker", Worker)
    monkeypatch.setattr("lowering.targets.here", lambda: targets.find("h100"))
    work = WORKLOAD.model_copy(update={"dtype": "bfloat16"})
    with pytest.raises(ValueError, match="h200 is not here; h100 is"):
        rank_correlation("h200", work, 1.0)
    found = rank_correlation("h100", work, 0.0)
    predictor, runner = made
    assert (predictor.makes, runner.makes) == (Predictor, GpuRunner)
    assert predictor.workload == runner.workload == work
    assert predictor.predicted == len(found.pairs) + 1 == len({*runner.tried})


def test_its_command_prints_a_line_for_each_op(monkeypatch: pytest.MonkeyPatch) -> None:
    def compared(target: str, workload: Workload, seconds: float, threads: int | None) -> Correlation:
        asked.append((target, workload.dtype, seconds, threads))
        return Correlation(0.5, ())

    asked: list[tuple[Any, ...]] = []
    monkeypatch.setattr("autotune.bench.correlation.rank_correlation", compared)
    result = CliRunner().invoke(correlation, ["cpu", "60", "1"])
    assert asked == [("cpu", "float32", 10.0, 1)] * 6
    assert result.output.splitlines()[0] == (
        "address_decode R=32 U=5 P=4 K=8 float32: 0.50 (0 schedules; two halves of the rounds agree to 0.00)"
    )
    assert len(result.output.splitlines()) == 6
    CliRunner().invoke(correlation, ["a100"])
    assert asked[6:] == [("a100", "bfloat16", 50.0, None)] * 6


@pytest.mark.parametrize(
    ("arguments", "message"),
    [(["nonsense", "5"], "target 'nonsense' is unknown"), (["cpu", "nan"], "budget is nan; it must be above 0")],
)
def test_its_command_refuses_invalid_arguments(arguments: list[str], message: str) -> None:
    result = CliRunner().invoke(correlation, arguments)
    assert isinstance(result.exception, ValueError) and message in str(result.exception)
