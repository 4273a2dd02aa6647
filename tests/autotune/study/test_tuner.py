"""A tuning run: what it measures, keeps and records."""

from __future__ import annotations

import multiprocessing
import sys
import tempfile
from collections.abc import Sequence
from multiprocessing.connection import Connection
from pathlib import Path
from time import perf_counter
from typing import Any

import pytest

from autotune import report
from autotune.measure.timing import Timing
from autotune.study import tuner
from autotune.study.empirical_search import is_faster
from autotune.study.search import Budget, Result
from autotune.study.tuner import displaced_by, tune
from autotune.study.worker import FailedError, OutOfTimeError, Worker
from lowering import targets
from lowering.fingerprint import stale
from schedules import records
from schedules.base import Schedule
from schedules.cpu import AddressDecodeBackward
from schedules.records import Record, Time
from schedules.workload import Workload
from tests.autotune import faulty
from tests.autotune.faulty import WORKLOAD, Synthetic
from tests.samples import read_only_folder

pytest.importorskip("optuna", reason="tuning needs optuna: pip install 'ramnet[tune]'")
pytest.importorskip("tvm", reason="tuning for the CPU needs tvm: pip install 'ramnet[tvm]'")

DEFAULT = AddressDecodeBackward.default(WORKLOAD)
BEST = AddressDecodeBackward(lanes=8, parallel=False)


def run(
    folder: Path, worker: Any, trials: int | None = None, workloads: Sequence[Workload] = (WORKLOAD,), **options: Any
) -> list[Result]:
    places = {"journal": folder / "journal.log", "records_file": folder / "records.jsonl", "threads": 1} | options
    return tune("cpu", workloads, worker, budget=Budget(seconds=None, trials=trials), **places)


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


def test_a_lucky_trial_is_found_out_by_the_final_comparison(tmp_path: Path) -> None:
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


def test_the_recorded_schedule_is_tried_right_after_the_default(tmp_path: Path) -> None:
    def gain(schedule: Schedule) -> float:
        return 2.0 if schedule == BEST else 1.0

    run(tmp_path, Synthetic(gain))
    (tmp_path / "journal.log").unlink()
    again = Synthetic(gain)
    (result,) = run(tmp_path, again, trials=2)
    assert again.tried[1:] == [DEFAULT, BEST]
    assert result.record.schedule() == BEST


def near(rows: int, lanes: int, **changes: Any) -> Record:
    """A record of as many rows."""
    time = Time(median=1e-6, spread=0.0, runs=9)
    return Record(
        workload=WORKLOAD.model_copy(update={"shape": {**WORKLOAD.shape, "R": rows}}), target="cpu", device="here",
        knobs={"lanes": lanes, "parallel": False}, how="measured", gain=1.0, gain_spread=0.0, tuned=time, default=time,
        eager=time, trials=1, fingerprint="", versions={}, date="2026-01-01",
    ).model_copy(update=changes)  # fmt: skip


def test_what_a_record_would_displace_is_its_own_and_what_is_used_until_then() -> None:
    def lanes(*known: Record) -> list[int]:
        found = displaced_by(WORKLOAD, known, "cpu", "here")
        return [schedule.lanes for schedule in found]  # type: ignore[attr-defined]

    assert lanes(near(512, 4, device="elsewhere"), near(512, 8)) == [8]
    assert lanes(near(256, 8), near(4096, 32)) == [8], "the nearest one is used where there is none of its own"
    assert lanes(near(512, 4, device="elsewhere"), near(256, 8)) == [4]
    assert lanes(near(512, 999), near(256, 8)) == [999, 8], "its own cannot be built"
    assert lanes(near(512, DEFAULT.lanes, knobs=DEFAULT.model_dump())) == [], "the default is tried anyway"
    assert lanes(near(16384, 8)) == [], "five doublings away is not used"
    other_op = WORKLOAD.model_copy(update={"op": "address_decode"})
    assert lanes(near(512, 4, workload=other_op, knobs={"lanes": 4, "unroll": 1, "parallel": False})) == []
    assert lanes(near(512, 4, target="a100", knobs={})) == []


def known(folder: Path, schedule: Schedule = BEST, **changes: Any) -> Record:
    """A record of the workload on this machine, of other code, in the file that is tuned into."""
    record = near(512, 8, device=targets.cpu_name(), knobs=schedule.model_dump(), **changes)
    records.merge(folder / "records.jsonl", [record])
    return record


def test_the_known_best_is_tried_with_however_few_trials_and_stays(tmp_path: Path) -> None:
    known(tmp_path)
    worker = Synthetic(lambda schedule: 1.6 if schedule == BEST else 1.0)
    (result,) = run(tmp_path, worker, trials=1)
    assert worker.tried[1:] == [DEFAULT, BEST]
    (record,) = records.load(tmp_path / "records.jsonl")
    assert (record, record.schedule(), record.gain) == (result.record, BEST, 1.6)
    assert stale(record) is None, "it was measured anew"


@pytest.mark.parametrize("gain", [0.9, 1.0, 1.02])
def test_within_the_noise_the_known_best_stays(tmp_path: Path, gain: float) -> None:
    class Noisy(Synthetic):
        def measure(self, candidates: Any, rounds: int, seconds: float) -> dict[str, Timing]:
            def seconds_of(schedule: Schedule | None, i: int) -> float:
                if schedule in (BEST, None):
                    return 1e-3
                # The others are faster by 2 % in the median, but in fewer than three of four rounds.
                return 1e-3 / 1.02 if gain > 1 and i % 5 < 3 else 1.1e-3

            return {
                name: Timing(tuple(seconds_of(schedule, i) for i in range(rounds)), rounds)
                for name, schedule in candidates.items()
            }

    known(tmp_path)
    (result,) = run(tmp_path, Noisy(None))
    assert result.record.schedule() == BEST


@pytest.mark.parametrize("better", [DEFAULT, AddressDecodeBackward(lanes=32, parallel=False)])
def test_what_is_faster_than_the_known_best_replaces_it(tmp_path: Path, better: Schedule) -> None:
    known(tmp_path)
    run(tmp_path, Synthetic(lambda schedule: 2.0 if schedule == better else 1.0))
    (record,) = records.load(tmp_path / "records.jsonl")
    assert record.schedule() == better


@pytest.mark.parametrize(("status", "stays"), [("wrong_result", False), ("crash", False), ("build_timeout", True)])
def test_a_known_best_that_fails_is_replaced_but_not_for_want_of_time(tmp_path: Path, status: str, stays: bool) -> None:
    class Fails(Synthetic):
        def try_out(self, schedule: Schedule) -> None:
            super().try_out(schedule)
            if schedule == BEST:
                raise FailedError(status, "in vain")

    before = known(tmp_path)
    (result,) = run(tmp_path, Fails(lambda schedule: 1.0), trials=2)
    assert (records.load(tmp_path / "records.jsonl") == [before]) == stays == result.kept
    assert bool(report.notes([result])) == stays


def test_a_known_best_outside_the_knobs_that_are_searched_is_compared_too(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(AddressDecodeBackward, "space", lambda workload: {"lanes": (4, 16), "parallel": (False,)})
    known(tmp_path)
    worker = Synthetic(lambda schedule: 1.6 if schedule == BEST else 1.0)
    run(tmp_path, worker)
    assert BEST in worker.tried
    (record,) = records.load(tmp_path / "records.jsonl")
    assert (record.schedule(), record.gain) == (BEST, 1.6)


def test_what_another_process_records_meanwhile_stays_where_it_was_not_compared(tmp_path: Path) -> None:
    class Meanwhile(Synthetic):
        def open(self, workload: Workload, target: str) -> None:
            super().open(workload, target)
            known(tmp_path)

    (result,) = run(tmp_path, Meanwhile(lambda schedule: 1.0), trials=1)
    (record,) = records.load(tmp_path / "records.jsonl")
    assert (record.schedule(), result.kept) == (BEST, True)


def test_other_threads_and_other_kernels_are_another_search(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    first = run(tmp_path, Synthetic(lambda schedule: 1.0))[0]
    assert first.record.device == targets.cpu_name()
    again = Synthetic(lambda schedule: 1.0)
    run(tmp_path, again, threads=1)
    assert len({*again.tried}) == 1, "the default alone"
    other = Synthetic(lambda schedule: 1.0)
    run(tmp_path, other, threads=2)
    monkeypatch.setattr(tuner, "fingerprint", lambda op, target: "another")
    changed = Synthetic(lambda schedule: 1.0)
    run(tmp_path, changed)
    assert len({*other.tried}) == len({*changed.tried}) == 8


def test_measured_replaces_modelled_and_not_the_reverse(tmp_path: Path) -> None:
    path = tmp_path / "records.jsonl"
    (result,) = run(tmp_path, Synthetic(lambda schedule: 2.0 if schedule == BEST else 1.0))
    modelled = result.record.model_copy(update={"how": "modelled, not run", "knobs": DEFAULT.model_dump()})
    records.merge(path, [modelled])
    assert records.load(path) == [result.record]
    path.unlink()
    records.merge(path, [modelled])
    run(tmp_path, Synthetic(lambda schedule: 2.0 if schedule == BEST else 1.0))
    assert records.load(path)[0].how == "measured"


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
def test_what_ends_the_run_keeps_the_records_of_the_workloads_before(tmp_path: Path, end: Any) -> None:
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
def test_what_cannot_be_written_or_read_is_found_out_before_the_search(tmp_path: Path, option: str) -> None:
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


def test_each_failure_in_a_worker_costs_one_trial(tmp_path: Path) -> None:
    with faulty.Impatient(faulty.hangs, makes=faulty.Faulty) as worker:
        (result,) = run(tmp_path, worker)
        path = tmp_path / "report.html"
        report.write([result], path)
    trials = result.study.optuna.get_trials()
    found = {
        (trial.params["lanes"], trial.params["parallel"]): trial.user_attrs["status"]
        for trial in trials
        if trial.user_attrs["status"] not in ("duplicate", "refused")
    }
    assert found == faulty.STATUS
    errors = {trial.user_attrs["status"]: trial.user_attrs["error"] for trial in trials}
    assert "signal 11" in errors["crash"] and "Segmentation fault" in errors["crash"]
    assert errors["build_timeout"] == "build took longer than 0.5 s"
    assert errors["run_timeout"] == "check took longer than 0.5 s"
    assert errors["build_error"] == "ValueError: no such vector"
    assert errors["run_error"] == "RuntimeError: out of luck"
    assert errors["wrong_result"] == "off by 1"
    assert result.record.trials == 8
    page = path.read_text()
    assert all(text in page for text in ("no such vector", "out of luck", "Segmentation fault"))
    assert page.count("data:image/png;base64") == 0  # two gains are no history


def test_what_goes_on_at_the_deadline_is_ended_and_says_nothing_of_the_schedule() -> None:
    hanging = AddressDecodeBackward(lanes=4, parallel=True)
    assert faulty.hangs(hanging, "build")
    with Worker(1, makes=faulty.Faulty) as worker:
        worker.open(WORKLOAD, "cpu")
        worker.deadline = perf_counter()
        with pytest.raises(OutOfTimeError, match="no more time for it in build"):
            worker.try_out(hanging)
        worker.deadline = None
        worker.try_out(DEFAULT)


def test_a_schedule_that_compiles_for_ever_is_ended() -> None:
    with faulty.Impatient(faulty.hangs, makes=faulty.Faulty) as worker:
        worker.open(WORKLOAD, "cpu")
        with pytest.raises(FailedError, match=r"predict took longer than 0\.5 s") as caught:
            worker.predict(DEFAULT)
        assert caught.value.status == "compile_timeout"
        worker.try_out(DEFAULT)


def test_the_report_shows_history_and_importances(tmp_path: Path) -> None:
    results = run(tmp_path, Synthetic(lambda schedule: 1.0 + schedule.lanes / 8))
    report.write(results, tmp_path / "report.html")
    page = (tmp_path / "report.html").read_text()
    assert page.count("data:image/png;base64") == 2
    assert "5.00× ± 0.00" not in page  # the gain is over the default, of 3
    assert "1.67× ± 0.00" in page and "lanes=32" in page


def open_worker(connection: Connection) -> None:
    """A tuner's process, in the middle of its work."""
    worker = Worker(1, makes=faulty.Faulty)
    worker.open(WORKLOAD, "cpu")
    connection.send(worker.process.pid)
    connection.recv()


@pytest.mark.skipif(sys.platform != "linux", reason="looks processes up as Linux lists them")
def test_a_worker_dies_with_its_parent_also_by_kill_9() -> None:
    psutil = pytest.importorskip("psutil")
    context = multiprocessing.get_context("fork")
    mine, theirs = context.Pipe()
    parent = context.Process(target=open_worker, args=(theirs,))
    parent.start()
    theirs.close()
    worker = psutil.Process(mine.recv())
    parent.kill()
    parent.join()
    gone, _ = psutil.wait_procs([worker], timeout=600)
    assert gone


def test_a_worker_is_gone_after_use_and_leaves_no_file_at_any_time(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Watched(Worker):
        def _call(self, method: str, *arguments: Any) -> Any:
            files.append(list(tmp_path.iterdir()))
            return super()._call(method, *arguments)

    files: list[list[Path]] = []
    others = {*multiprocessing.active_children()}  # of other tests
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    with Watched(1, makes=faulty.Faulty) as worker:
        worker.open(Workload(op="address_decode_backward", shape={"R": 4, "U": 1, "P": 2, "K": 1}), "cpu")
        assert len({*multiprocessing.active_children()} - others) == 1
    assert {*multiprocessing.active_children()} == others
    assert files == [[]], "a log that is there while the worker starts stays when its parent is killed then"
    assert not list(tmp_path.iterdir())
