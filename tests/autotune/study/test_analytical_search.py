"""Tuning for a GPU that is not available: candidates are compiled and ranked by a model, as all outputs say."""

from __future__ import annotations

import io
from dataclasses import replace
from pathlib import Path

import pytest
from rich.console import Console

from autotune import progress, report
from autotune.model.prediction import Prediction, Predictor
from autotune.study.analytical_search import LEAST_GAIN
from autotune.study.search import Progress
from autotune.study.worker import FailedError, Worker
from lowering.fingerprint import stale
from lowering.gpu.resources import Compiled, Resources, Work
from schedules import records
from schedules.base import Schedule
from schedules.gpu import MemoryStep
from schedules.workload import Workload
from tests.autotune.study.predicting import DEFAULT, NEEDS, NOT_RUN, WORKLOAD, Synthetic, others, run

pytest.importorskip("optuna", reason="tuning needs optuna: pip install 'ramnet[tune]'")


@pytest.mark.parametrize("target", ["a100", "mi300x"])
def test_every_candidate_is_compiled(tmp_path: Path, compiler: Worker, target: str) -> None:
    pytest.importorskip("triton", reason="the GPU kernels need triton: pip install 'ramnet[gpu]'")
    shown: list[Progress] = []
    (result,) = run(tmp_path, compiler, target=target, trials=2, on_progress=shown.append)
    record = result.record
    assert (record.how, record.device, record.target) == (NOT_RUN, target, target)
    assert record.eager is None and result.over_eager is None
    assert (record.tuned.runs, record.tuned.spread) == (0, 0.0)
    assert record.launches and all(launch.spilled == 0 and launch.registers > 0 for launch in record.launches)
    assert record.versions["triton"] and stale(record) is None
    assert {step.how for step in shown} == {NOT_RUN}
    first, *_ = result.study.optuna.get_trials()
    assert first.params == DEFAULT.model_dump()
    assert first.user_attrs["how"] == NOT_RUN
    assert first.user_attrs["launches"][0]["registers"] > 0
    assert first.user_attrs["seconds"] > 0
    assert records.load(tmp_path / "records.jsonl") == [record]


def test_the_best_by_the_model_is_recorded_with_what_its_binaries_need(tmp_path: Path) -> None:
    best = others()[0]
    worker = Synthetic(lambda schedule: 1e-5 if schedule == best else 2e-5)
    shown: list[Progress] = []
    (result,) = run(tmp_path, worker, on_progress=shown.append)
    assert shown[-1].doing == "choosing by the model"
    assert worker.tried.count(DEFAULT) == 1
    trial = result.study.finished()[best]
    assert (trial.user_attrs["how"], trial.user_attrs["binds"]) == (NOT_RUN, [["chain", 1e-5]])
    record = result.record
    assert (record.device, record.how) == ("a100", NOT_RUN)
    assert {(time.spread, time.runs) for time in (record.tuned, record.default)} == {(0.0, 0)}
    assert (record.schedule(), record.gain, record.gain_spread) == (best, 2.0, 0.0)
    assert (record.tuned.median, record.default.median) == (1e-5, 2e-5)
    assert record.launches == (NEEDS,)
    assert record.trials == len(others()) + 1


def test_the_default_stays_within_the_accuracy_of_the_model(tmp_path: Path) -> None:
    (result,) = run(tmp_path, Synthetic(lambda schedule: 1e-5 if schedule == DEFAULT else 1e-5 / (LEAST_GAIN - 0.001)))
    assert result.is_default
    assert result.record.gain == 1.0
    assert "no gain" in report.cells(result)


def test_a_schedule_that_cannot_be_used_is_never_recorded(tmp_path: Path) -> None:
    spills = replace(NEEDS_SPILLED, seconds=1e-9)
    (result,) = run(tmp_path, Synthetic(lambda schedule: 1e-5 if schedule == DEFAULT else spills))
    assert result.is_default
    assert result.study.summary().failures == {"spills": len(others())}
    failed = [trial for trial in result.study.optuna.get_trials() if trial.user_attrs["status"] == "spills"]
    assert {trial.user_attrs["error"] for trial in failed} == {"kernel spills 8 bytes"}
    assert all(trial.user_attrs["launches"][0]["spilled"] == 8 for trial in failed)


NEEDS_SPILLED = Prediction(1e-5, (NEEDS.model_copy(update={"spilled": 8}),), (), "spills", "kernel spills 8 bytes")


def test_gains_are_relative_to_the_default_even_if_it_cannot_be_used(tmp_path: Path) -> None:
    (result,) = run(tmp_path, Synthetic(lambda schedule: NEEDS_SPILLED if schedule == DEFAULT else 4e-5))
    assert not result.is_default
    assert result.record.gain == 0.25


def test_if_no_schedule_can_be_used_no_record_is_written(tmp_path: Path) -> None:
    with pytest.raises(RuntimeError, match=r"none of the schedules that were compiled is fit for a100; .* spills 8"):
        run(tmp_path, Synthetic(lambda schedule: NEEDS_SPILLED))
    assert not (tmp_path / "records.jsonl").exists()


def test_a_default_that_cannot_be_compiled_ends_the_run_in_one_line(tmp_path: Path) -> None:
    with pytest.raises(RuntimeError, match="the default schedule fails: no such register"):
        run(tmp_path, Synthetic(lambda schedule: FailedError("compile_error", "no such register")))


def test_a_stopped_search_is_resumed(tmp_path: Path) -> None:
    first = Synthetic(lambda schedule: 1e-5)
    run(tmp_path, first, trials=2)
    second = Synthetic(lambda schedule: 1e-5)
    (result,) = run(tmp_path, second, trials=4)
    assert result.record.trials == 4
    assert not {*first.tried[1:]} & {*second.tried[1:]}


def test_another_time_model_starts_another_search(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (first,) = run(tmp_path, Synthetic(lambda schedule: 1e-5), trials=2)
    monkeypatch.setattr("lowering.fingerprint._time_models", lambda: frozenset({"autotune.model.cpu"}))
    (second,) = run(tmp_path, Synthetic(lambda schedule: 1e-5), trials=2)
    assert [result.record.trials for result in (first, second)] == [2, 2]
    assert first.study.name != second.study.name and first.record.fingerprint != second.record.fingerprint


def compile_badly(workload: Workload, target: str, schedule: Schedule) -> list[Compiled]:
    """For ``Predictor``: ways to fail, by the compiler and the number of threads."""
    assert isinstance(schedule, MemoryStep)
    if schedule.compiler == "tir":
        raise ValueError("no such instruction")
    spilled = 16 if schedule.threads == 128 else 0
    work = Work(programs=64, threads=schedule.threads, dram_bytes=1e6, cache_bytes=1e6)
    return [Compiled("kernel", work, Resources(255, spilled, spilled, 0), instructions=100)]


def bad_predictor() -> Predictor:
    return Predictor(compile_badly)


def test_each_failure_in_a_worker_costs_one_trial_and_says_why(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("lowering.nvcc.nvcc", lambda: "nvcc")  # TIR is then tried on any machine
    with Worker(1, makes=bad_predictor) as worker:
        (result,) = run(tmp_path, worker)
    assert result.is_default
    found = {
        (trial.params["compiler"], trial.params["threads"]): (trial.user_attrs["status"], trial.user_attrs["error"])
        for trial in result.study.optuna.get_trials()
        if trial.user_attrs["status"] not in ("duplicate", "refused")
    }
    assert found["triton", 64] == ("ok", "")
    assert found["triton", 128] == ("spills", "kernel spills 16 bytes of a thread's 255 registers")
    assert found["tir", 64] == ("compile_error", "ValueError: no such instruction")


def test_without_a_compiler_its_candidates_fail_and_the_search_goes_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from lowering.gpu.offline import NoCompilerError, compile_for

    monkeypatch.setenv("RAMNET_CACHE", str(tmp_path / "no binaries"))
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(NoCompilerError, match=r"TVM, which is not installed: pip install 'ramnet\[tvm\]'") as found:
        compile_for(WORKLOAD, "a100", MemoryStep(compiler="tir"))
    assert found.value.status == "no_compiler"
    with pytest.raises(NoCompilerError, match="tir does not compile for mi300x; use triton"):
        compile_for(WORKLOAD, "mi300x", MemoryStep(compiler="tir"))


def test_the_table_the_page_and_the_line_say_that_nothing_was_run(tmp_path: Path) -> None:
    results = run(tmp_path, Synthetic(lambda schedule: 1e-5 if schedule == others()[0] else 2e-5))
    screen = Console(file=io.StringIO(), width=80)
    screen.print(report.table(results))
    text = screen.file.getvalue()  # type: ignore[attr-defined]
    assert "compiled; times modelled, not run" in text
    assert "2.00×" in text and "eager" not in text
    page = tmp_path / "report.html"
    report.write(results, page)
    written = page.read_text()
    assert "a100: modelled, not run</h1>" in written
    assert "Nothing was run." in written
    line = io.StringIO()
    with progress.shown(Console(file=line, force_terminal=True, width=200)) as update:
        update(Progress(WORKLOAD, NOT_RUN, "searching", 1, 6, 1.5, 2, 9.0))
    assert NOT_RUN in line.getvalue()
    assert "2 failed" in line.getvalue() and "9 s left" in line.getvalue()
    measured = io.StringIO()
    with progress.shown(Console(file=measured, force_terminal=True, width=200)) as update:
        update(Progress(WORKLOAD, "measured", "searching", 1, 6, 1.5, 2, None))
    assert "best 1.50× · 2 failed · searching\n" in measured.getvalue()
    piped = io.StringIO()
    with progress.shown(Console(file=piped, width=200)) as update:
        update(Progress(WORKLOAD, "measured", "searching", 1, 6, 1.5, 2, None))
    assert not piped.getvalue()


def test_candidates_of_a_compiler_that_does_not_serve_the_target_are_refused(tmp_path: Path) -> None:
    worker = Synthetic(lambda schedule: 1e-5)
    (result,) = run(tmp_path, worker, target="mi300x")
    assert {schedule.compiler for schedule in worker.tried} == {"triton"}  # type: ignore[attr-defined]
    assert not result.study.summary().failures


def test_without_tvm_candidates_of_tir_are_refused_and_the_search_goes_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("RAMNET_CACHE", str(tmp_path / "no binaries"))
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    worker = Synthetic(lambda schedule: 1e-5)
    (result,) = run(tmp_path, worker)
    assert {schedule.compiler for schedule in worker.tried} == {"triton"}  # type: ignore[attr-defined]
    assert result.record.trials == len({*worker.tried})
