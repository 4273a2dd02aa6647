"""A tuning run: what it measures, keeps and records."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from autotune import report
from autotune.measure.timing import Timing
from autotune.study import tuner
from autotune.study.empirical_search import is_faster
from autotune.study.search import Budget
from autotune.study.worker import FailedError
from lowering import targets
from schedules import records
from schedules.base import Schedule
from schedules.cpu import AddressDecodeBackward
from schedules.workload import Workload
from tests.autotune.faulty import WORKLOAD, Synthetic
from tests.autotune.study.tuning import BEST, DEFAULT, run
from tests.samples import read_only_folder

pytest.importorskip("optuna", reason="tuning needs optuna: pip install 'ramnet[tune]'")
pytest.importorskip("tvm", reason="tuning for the CPU needs tvm: pip install 'ramnet[tvm]'")


def test_the_fastest_is_recorded_with_its_gain(tmp_path: Path) -> None:
    worker = Synthetic(lambda schedule: 2.0 if schedule == BEST else 1.0)
    (result,) = run(tmp_path, worker)
    assert worker.tried[1] == DEFAULT
    (record,) = records.load(tmp_path / "records.jsonl")
    assert record == result.record
    assert (record.schedule(), record.gain, record.gain_spread) == (BEST, 2.0, 0.0)
    assert (record.trials, record.how) == (8, "measured")
    assert record.default.median == 2 * record.tuned.median
    assert result.over_eager[0] == pytest.approx(20)


def test_the_default_stays_where_there_is_no_gain(tmp_path: Path) -> None:
    (result,) = run(tmp_path, Synthetic(lambda schedule: 1.0))
    assert result.is_default
    assert (result.record.gain, result.record.gain_spread) == (1.0, 0.0)
    assert "no gain" in report.cells(result)


def test_a_trial_that_was_faster_by_chance_loses_the_final_comparison(tmp_path: Path) -> None:
    class Lucky(Synthetic):
        def measure(self, candidates: Any, rounds: int, seconds: float) -> dict[str, Timing]:
            self.gain = lambda schedule: 2.0 if schedule == BEST and "candidate" in candidates else 1.0
            return super().measure(candidates, rounds, seconds)

    (result,) = run(tmp_path, Lucky(None))
    assert result.study.best(1) == [BEST]
    assert result.is_default


@pytest.mark.parametrize(("wins", "faster"), [(9, True), (8, True), (6, False), (5, False), (0, False)])
def test_faster_means_in_more_than_three_of_four_rounds(wins: int, faster: bool) -> None:
    candidate = Timing(tuple(0.5 if i < wins else 1.5 for i in range(9)), 9)
    assert is_faster(Timing((1.0,) * 9, 9), candidate) == faster


def test_trials_of_an_earlier_run_count_and_are_not_repeated(tmp_path: Path) -> None:
    first = Synthetic(lambda schedule: 1.0)
    run(tmp_path, first, trials=3)
    second = Synthetic(lambda schedule: 1.0)
    (result,) = run(tmp_path, second, trials=5)
    assert result.record.trials == 5
    assert not {*first.tried[1:]} & {*second.tried[1:]}


def test_other_threads_and_other_kernels_are_another_search(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    first = run(tmp_path, Synthetic(lambda schedule: 1.0))[0]
    assert first.record.device == targets.cpu_name()
    again = Synthetic(lambda schedule: 1.0)
    run(tmp_path, again, threads=1)
    assert len({*again.tried}) == 1, "the default alone"
    other = Synthetic(lambda schedule: 1.0)
    run(tmp_path, other, threads=2)
    monkeypatch.setattr(tuner, "fingerprint", lambda op, target, how: "another")
    changed = Synthetic(lambda schedule: 1.0)
    run(tmp_path, changed)
    assert len({*other.tried}) == len({*changed.tried}) == 8


def test_ctrl_c_keeps_the_journal_and_writes_no_record(tmp_path: Path) -> None:
    class Impatient(Synthetic):
        def try_out(self, schedule: Schedule) -> None:
            super().try_out(schedule)
            if len(self.tried) == 5:
                raise KeyboardInterrupt

    impatient = Impatient(lambda schedule: 1.0)
    with pytest.raises(KeyboardInterrupt):
        run(tmp_path, impatient)
    assert not (tmp_path / "records.jsonl").exists()
    later = Synthetic(lambda schedule: 1.0)
    (result,) = run(tmp_path, later)
    assert later.tried[1] == impatient.tried[-1]
    assert result.record.trials == 8
    assert result.study.summary().statuses["interrupted"] == 1


@pytest.mark.parametrize("end", [KeyboardInterrupt, SystemExit, FailedError("crash", "signal 11"), OSError("no space")])
def test_an_interrupted_run_keeps_the_records_of_finished_workloads(tmp_path: Path, end: Any) -> None:
    workloads = [WORKLOAD.model_copy(update={"shape": {**WORKLOAD.shape, "R": rows}}) for rows in (32, 64, 128)]

    class EndsInTheThird(Synthetic):
        def open(self, workload: Workload, target: str) -> None:
            super().open(workload, target)
            if workload == workloads[2]:
                raise end

    with pytest.raises((KeyboardInterrupt, SystemExit, RuntimeError, OSError)):
        run(tmp_path, EndsInTheThird(lambda schedule: 1.0), trials=1, workloads=workloads)
    assert {record.workload.shape["R"] for record in records.load(tmp_path / "records.jsonl")} == {32, 64}
    run(tmp_path, Synthetic(lambda schedule: 1.0), trials=1, workloads=workloads)
    assert len(records.load(tmp_path / "records.jsonl")) == 3


def test_a_journal_is_read_once_for_all_workloads(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    read: list[Path] = []
    monkeypatch.setattr("autotune.study.journal._check", read.append)
    workloads = [WORKLOAD.model_copy(update={"shape": {**WORKLOAD.shape, "R": rows}}) for rows in (32, 64)]
    results = run(tmp_path, Synthetic(lambda schedule: 1.0), trials=2, workloads=workloads)
    assert [result.record.trials for result in results] == [2, 2]
    assert read == [tmp_path / "journal.log"]


@pytest.mark.parametrize("option", ["journal", "records_file"])
def test_unwritable_and_unreadable_paths_are_refused_before_the_search(tmp_path: Path, option: str) -> None:
    (tmp_path / "folder").mkdir()
    (tmp_path / "damaged").write_text("a letter")
    search = Synthetic(lambda schedule: 1.0)
    for path, why in ((tmp_path / "folder", "is a folder"), (tmp_path / "damaged", "line 1"),
                      (tmp_path / "damaged" / "below", "cannot be written: Not a directory"),
                      (read_only_folder(tmp_path) / "file", "cannot be written: ")):  # fmt: skip
        with pytest.raises((ValueError, OSError), match=why):
            run(tmp_path, search, **{option: path})
    with pytest.raises(ValueError, match="same is given for two files"):
        run(tmp_path, search, journal=tmp_path / "same", records_file=tmp_path / "same")
    assert not search.tried
    assert not [path for path in tmp_path.iterdir() if path.name == "records.jsonl"]


def test_a_default_that_fails_ends_the_run_in_one_line(tmp_path: Path) -> None:
    class Broken(Synthetic):
        def try_out(self, schedule: Schedule) -> None:
            raise FailedError("wrong_result", "the relative RMSE is 1.0e+00; 1e-05 is allowed")

    with pytest.raises(RuntimeError, match=r"R=512 .*: the default schedule fails: the relative RMSE is 1.0e"):
        run(tmp_path, Broken(None))
    assert not (tmp_path / "records.jsonl").exists()


@pytest.mark.parametrize(("options", "named"), [({"seconds": 0}, "budget is 0"), ({"trials": -1}, "trials is -1")])
def test_an_empty_budget_is_refused(options: dict[str, Any], named: str) -> None:
    with pytest.raises(ValueError, match=named):
        Budget(**options)


def test_the_report_shows_history_and_importances(tmp_path: Path) -> None:
    results = run(tmp_path, Synthetic(lambda schedule: 1.0 + schedule.lanes / 8))
    report.write(results, tmp_path / "report.html")
    page = (tmp_path / "report.html").read_text()
    assert page.count("data:image/png;base64") == 2
    assert "5.00× ± 0.00" not in page  # the gain is over the default, of 3
    assert "1.67× ± 0.00" in page and "lanes=32" in page


def test_given_schedules_are_tried_first_and_in_their_order(tmp_path: Path) -> None:
    worker = Synthetic(lambda schedule: 1.0)
    first = [AddressDecodeBackward(lanes=16, parallel=False), AddressDecodeBackward(lanes=8, parallel=True)]
    run(tmp_path, worker, trials=3, first={WORKLOAD.name: first})
    assert [*dict.fromkeys(worker.tried)][:3] == [DEFAULT, *first]
