"""Rank correlation between modelled and measured times."""

from __future__ import annotations

import pytest
from click.testing import CliRunner

from autotune.correlation import FEWEST, Pair, correlate, correlation, rank_correlation, spearman
from schedules.cpu import MemoryStep
from schedules.workload import Workload

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
    assert spearman([1, 1, 1], [1, 2, 3]) == 0.0


def test_a_model_that_tells_the_order_has_a_rho() -> None:
    found = correlate(pairs([1, 2, 3, 4, 5], [2, 4, 6, 8, 10]))
    assert found.rho == pytest.approx(1.0)
    assert str(found) == "1.00 (5 schedules; two halves of the rounds agree to 1.00)"


def test_schedules_within_noise_have_none() -> None:
    found = correlate(pairs([1, 2, 3, 4, 5], [1.0, 1.01, 1.02, 1.03, 1.04]))
    assert found.rho is None
    assert "no order to tell: the schedules are 1.04× apart" in str(found)


def test_rounds_that_disagree_on_the_order_tell_none() -> None:
    halves = [(1.0, 5.0), (2.0, 4.0), (3.0, 3.0), (4.0, 2.0), (5.0, 1.0)]
    found = correlate(pairs([1, 2, 3, 4, 5], [1, 2, 3, 4, 5], halves))
    assert found.rho is None
    assert "two halves of the rounds agree to -1.00" in str(found)


def test_a_few_schedules_tell_nothing() -> None:
    few = FEWEST - 1
    assert correlate(pairs([1.0] * few, [1.0] * few)).reason == f"fewer than {FEWEST} schedules ran"


def test_a_gpu_that_is_not_here_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("lowering.targets.here", lambda: None)
    with pytest.raises(ValueError, match="h200 is not here; there is no GPU"):
        rank_correlation("h200", WORKLOAD.model_copy(update={"dtype": "bfloat16"}), 1.0)


def test_on_the_cpu_schedules_are_modelled_and_measured(monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("tvm", reason="the CPU kernels need tvm: pip install 'ramnet[tvm]'")
    monkeypatch.setattr("autotune.time_model_cpu.bandwidth", lambda level, threads=1: 1e10)
    monkeypatch.setattr("autotune.correlation.BATCH", 2)
    found = rank_correlation("cpu", WORKLOAD, 1e-3, threads=1)
    assert len(found.pairs) == 2
    assert all(pair.modelled > 0 and pair.measured > 0 for pair in found.pairs)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [(["nonsense", "5"], "target 'nonsense' is unknown"), (["cpu", "nan"], "budget is nan; it must be above 0")],
)
def test_its_command_refuses_what_makes_no_sense(arguments: list[str], message: str) -> None:
    result = CliRunner().invoke(correlation, arguments)
    assert isinstance(result.exception, ValueError) and message in str(result.exception)
