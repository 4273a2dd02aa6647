"""A worker's process: its failures, its end, and what it leaves behind."""

from __future__ import annotations

import multiprocessing
import sys
import tempfile
from multiprocessing.connection import Connection
from pathlib import Path
from time import perf_counter
from typing import Any

import pytest

from autotune import report
from autotune.study.worker import FailedError, OutOfTimeError, Worker
from schedules.cpu import AddressDecodeBackward
from schedules.workload import Workload
from tests.autotune import faulty
from tests.autotune.faulty import WORKLOAD
from tests.autotune.study.tuning import DEFAULT, run

pytest.importorskip("optuna", reason="tuning needs optuna: pip install 'ramnet[tune]'")
pytest.importorskip("tvm", reason="tuning for the CPU needs tvm: pip install 'ramnet[tvm]'")


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


def test_an_operation_at_the_deadline_is_killed_and_is_not_a_failure_of_the_schedule() -> None:
    hanging = AddressDecodeBackward(lanes=4, parallel=True)
    assert faulty.hangs(hanging, "build")
    with Worker(1, makes=faulty.Faulty) as worker:
        worker.open(WORKLOAD, "cpu")
        worker.deadline = perf_counter()
        with pytest.raises(OutOfTimeError, match="no more time for it in build"):
            worker.try_out(hanging)
        worker.deadline = None
        worker.try_out(DEFAULT)


def test_a_schedule_that_compiles_forever_is_killed() -> None:
    with faulty.Impatient(faulty.hangs, makes=faulty.Faulty) as worker:
        worker.open(WORKLOAD, "cpu")
        with pytest.raises(FailedError, match=r"predict took longer than 0\.5 s") as caught:
            worker.predict(DEFAULT)
        assert caught.value.status == "compile_timeout"
        worker.try_out(DEFAULT)


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
        def call(self, method: str, *arguments: Any) -> Any:
            files.append(list(tmp_path.iterdir()))
            return super().call(method, *arguments)

    files: list[list[Path]] = []
    others = {*multiprocessing.active_children()}  # of other tests
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    with Watched(1, makes=faulty.Faulty) as worker:
        worker.open(Workload(op="address_decode_backward", shape={"R": 4, "U": 1, "P": 2, "K": 1}), "cpu")
        assert len({*multiprocessing.active_children()} - others) == 1
    assert {*multiprocessing.active_children()} == others
    assert files == [[]], "a log that is there while the worker starts stays when its parent is killed then"
    assert not list(tmp_path.iterdir())


def test_a_trial_lasts_as_long_as_its_limits_allow() -> None:
    """Two schedules are built, one is checked, and they are timed."""
    assert Worker(1, build_limit=600.0, run_limit=300.0).longest_trial > 2 * 600 + 2 * 300
