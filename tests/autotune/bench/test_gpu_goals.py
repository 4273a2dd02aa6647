"""The goals of a GPU's benchmark on hand-made tables, and its facts on spills and the time model."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner

from autotune.bench import correlation
from autotune.bench.correlation import FACT, Correlation
from autotune.bench.cpu import everything as on_cpu
from autotune.bench.gpu import decode_step, scan, training
from autotune.bench.gpu.goals import DECODED, PLACED, TRAINED, goals
from autotune.bench.gpu.run import NO_FLA
from autotune.bench.run import TUNED, Row, Run, Table
from autotune.model import spills
from lowering.gpu.offline import NoCompilerError
from lowering.gpu.resources import Compiled, Resources, Work
from ramnet import RamNetConfig
from schedules import records
from schedules.gpu import SCHEDULES
from schedules.kinds import default_schedule
from schedules.of_model import of_model
from schedules.workload import Workload
from tests.autotune.bench.tables import BESIDE_GLA, SCAN, table


def met(*tables: Table, **facts: float) -> dict[str, Any]:
    return {goal.name: goal for goal in goals({x.name: x for x in tables}, facts)}


def test_the_goals_of_the_scan() -> None:
    found = met(SCAN, BESIDE_GLA)
    goal = found["memory_scan forward + backward, tuned, over chunk_gla"]
    assert (goal.measured, goal.verdict) == (pytest.approx(0.5), "met")
    goal = found["memory_scan forward + backward, tuned, over the floor"]
    assert (goal.measured, goal.verdict) == (pytest.approx(5.0), "not met")
    goal = found["memory_scan forward + backward over the quickest eager form"]
    assert (goal.measured, goal.verdict, goal.note) == (pytest.approx(150), "not met", scan.SORTED)


def test_the_goal_over_attention_is_that_of_the_worst_length() -> None:
    name = "memory_scan over FlashAttention, forward + backward, T = 8192 and up"
    at = {
        t: table(f"scan and attention, T = {t}", TUNED, {TUNED: 1.0, scan.FLASH: ratio})
        for t, ratio in ((4096, 0.5), (8192, 1.5), (16384, 2.0), (32768, 4.0))
    }
    goal = met(*at.values())[name]
    assert (goal.measured, goal.note, goal.verdict) == (1.5, "at T = 8192", "met")
    del at[32768]
    goal = met(*at.values())[name]
    assert (goal.verdict, goal.note) == ("not measured", "not measured at T = 32768; ")


def test_the_goals_of_decoding_and_training() -> None:
    decoded = table(
        DECODED,
        TUNED,
        {TUNED: 1.0, decode_step.GLA: 3.0, decode_step.GLA + decode_step.COMPILED: 1.5, decode_step.DELTA: 2.5},
    )
    placed = table(PLACED, "at position 1,000", {"at position 1,000": 1.0, "at position 1,000,000": 0.8})
    trained = table(TRAINED, TUNED, {TUNED: 1.0, training.GLA: 1.5})
    found = met(decoded, placed, trained)
    over_gla, over_delta = (
        found[f"decode tokens/s, 340m, batch 64, over {x}"] for x in (decode_step.GLA, decode_step.DELTA)
    )
    assert (over_gla.measured, over_gla.verdict, over_delta.verdict) == (1.5, "not met", "met")
    assert over_gla.note.endswith("torch.compile"), "the quicker of a peer's forms counts"
    assert found["decode at 1 M tokens of context over at 1 k"].verdict == "met"
    assert found["training step tokens/s, 340m, 65 k tokens, over GLA layers"].verdict == "met"


def test_a_goal_that_was_not_measured_has_the_reason() -> None:
    missing = table(scan.GLA_NAME, TUNED, {TUNED: 2.0}, **{scan.GLA: NO_FLA})
    goal = met(missing)["memory_scan forward + backward, tuned, over chunk_gla"]
    assert (goal.measured, goal.verdict, goal.note) == (None, "not measured", NO_FLA)
    without_kernels = Table(scan.GLA_NAME, "what", 1, scan.GLA, [Row(scan.GLA, 1.0, 0, 1.0, 0, 7, 7)], {TUNED: "wrong"})
    goal = met(without_kernels)["memory_scan forward + backward, tuned, over chunk_gla"]
    assert (goal.verdict, goal.note) == ("not measured", "wrong")
    assert [goal.verdict for goal in met().values()] == ["not measured"] * 8


def test_correlations_and_spills_are_goals() -> None:
    name = f"{FACT}, 1. memory_scan"
    found = met(**{name: 0.6, "bytes of registers spilled by 9 schedules for sm_80": 0.0})
    assert found[name].verdict == "not met"
    assert found["bytes of registers spilled by 9 schedules for sm_80"].verdict == "met"


def test_each_shipped_schedule_is_compiled_once_per_architecture() -> None:
    asked = []

    def compiled(workload: Workload, target: str, schedule: Any) -> list[Compiled]:
        asked.append((workload.kernel_name, schedule))
        if workload.op == "memory_step":
            raise NoCompilerError("no TVM")
        work = Work(programs=1, threads=32, dram_bytes=0, cache_bytes=0)
        return [Compiled(name, work, Resources(9, spilled, spilled, 0), 0) for name, spilled in (("a", 8), ("b", 4))]

    found = list(spills.spilled("sm_90", compiled))
    assert len(asked) == len(set(asked)) >= 6
    assert {x.found for x in found if x.workload.op != "memory_step"} == {12}
    assert {(x.found, x.reason) for x in found if x.workload.op == "memory_step"} == {(None, "no TVM")}


def test_both_architectures_have_schedules_for_every_op() -> None:
    for arch in spills.ARCHITECTURES:
        assert {workload.op for _, workload, _ in spills.shipped(arch)} == set(SCHEDULES)


def test_ops_without_a_record_are_compiled_with_their_default(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(records, "SHIPPED", tmp_path / "none")
    found = spills.shipped("sm_90")
    assert {target for target, *_ in found} == {"h100", "h200"}
    assert all(schedule == default_schedule(work, target) for target, work, schedule in found)
    assert len(found) == 2 * len(SCHEDULES)


def test_the_command_prints_the_spills_of_each_schedule_or_why_they_are_unknown(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    work = of_model(RamNetConfig.preset("tiny"))[3]

    def spilled(arch: str) -> list[spills.Spilled]:
        known = spills.Spilled(arch, work, default_schedule(work, "cpu"), 8)
        return [known, known._replace(found=None, reason="no nvcc")]

    monkeypatch.setattr(spills, "spilled", spilled)
    lines = CliRunner().invoke(spills.spills).output.splitlines()
    assert lines[:2] == [f"sm_80, {work.name}: 8 bytes spilled", f"sm_80, {work.name}: no nvcc"]
    assert len(lines) == 4


def test_the_model_is_compared_with_measurements_where_there_is_an_order(monkeypatch: pytest.MonkeyPatch) -> None:
    workloads = of_model(RamNetConfig.preset("340m"))[:3]
    answers = iter(
        [Correlation(0.8, (), agreement=0.9), Correlation(None, (), reason="no order"), RuntimeError("it fails")]
    )

    def compared(target: str, workload: Workload, seconds: float) -> Correlation:
        assert (target, seconds) == ("cpu", 10)
        answer = next(answers)
        if isinstance(answer, RuntimeError):
            raise answer
        return answer

    monkeypatch.setattr(correlation, "rank_correlation", compared)
    run = Run()
    found: list[int] = []
    correlation.add_facts(run, workloads, 30, on_found=lambda: found.append(len(run.notices)))
    assert found == [1, 2, 3], "it is told after each workload"
    assert run.facts == {f"{FACT}, 1. address_decode": 0.8}
    assert [notice.rpartition(": ")[2] for notice in run.notices] == [
        "0.80 (0 schedules; two halves of the rounds agree to 0.90)",
        "no order (0 schedules)", "it fails",
    ]  # fmt: skip


def test_a_quick_run_on_the_cpu_leaves_the_model_out() -> None:
    run = Run(quick=True)
    on_cpu._correlate(run)
    assert run.notices == [f"{FACT} left out of a quick run"]
