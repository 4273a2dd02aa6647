"""What a tuning run prints and writes: the table, and the page with its trials."""

from __future__ import annotations

import io
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from autotune import report
from autotune.study.search import Budget, Result
from autotune.study.tuner import tune
from autotune.study.worker import FailedError
from schedules.base import Schedule
from schedules.cpu import AddressDecodeBackward
from schedules.records import Launch
from tests.autotune.faulty import WORKLOAD, Synthetic

pytest.importorskip("optuna", reason="tuning needs optuna: pip install 'ramnet[tune]'")

DEFAULT = AddressDecodeBackward.default(WORKLOAD)
BEST = AddressDecodeBackward(lanes=8, parallel=False)


class Some(Synthetic):
    """Two schedules fail to build, one fails to run."""

    def try_out(self, schedule: Schedule) -> None:
        super().try_out(schedule)
        assert isinstance(schedule, AddressDecodeBackward)
        if schedule.lanes == 32:
            raise FailedError("build_error", "no such <vector>")
        if schedule == AddressDecodeBackward(lanes=4, parallel=True):
            raise FailedError("run_error", "out of luck")


def results(folder: Path, worker: Any, trials: int | None = None) -> list[Result]:
    return tune(
        "cpu", [WORKLOAD], worker, journal=folder / "journal.log", records_file=folder / "records.jsonl",
        budget=Budget(None, trials), threads=1, device="a <processor>",
    )  # fmt: skip


@pytest.fixture
def gained(tmp_path: Path) -> Result:
    """A result that is twice as fast as the default, with three failures."""
    (result,) = results(tmp_path, Some(lambda schedule: 2.0 if schedule == BEST else 1.0))
    return result


@pytest.fixture
def stays(tmp_path: Path) -> Result:
    """A search of which only the default was tried."""
    (result,) = results(tmp_path / "stays", Synthetic(lambda schedule: 1.0), trials=1)
    return result


def printed(*found: Result, table: Any = report.table) -> list[str]:
    """The lines on a terminal of 80 columns, without those that are empty."""
    console = Console(file=io.StringIO(), width=80)
    console.print(table(found))
    lines = (" ".join(line.split()) for line in console.file.getvalue().splitlines())  # type: ignore[attr-defined]
    return [line for line in lines if line.strip("─ ")]


def test_the_table_has_a_row_of_times_gains_and_trials_for_each_op(gained: Result, stays: Result) -> None:
    lines = printed(gained, stays)
    assert lines[0] == "tuned kernels against eager PyTorch, a call"
    assert lines[1] == "op default tuned eager gain over eager trials"
    assert lines[2:] == [
        "address_decode 2.00 ms 1.00 ms 20.0 ms 2.00× 20× 8", "backward ± 0.00 ± 0 3 failed", "R=512",
        "address_decode 2.00 ms 20.0 ms no gain 10× 1", "backward ± 0", "R=512",
    ]  # fmt: skip


def test_the_knobs_of_each_schedule_that_was_chosen_are_named(gained: Result, stays: Result) -> None:
    assert printed(gained, stays, table=report.chosen) == [
        "schedules chosen", "op knobs", "address_decode backward R=512 lanes=8 parallel=False",
        f"address_decode backward R=512 lanes={DEFAULT.lanes} parallel={DEFAULT.parallel} (default)",
    ]  # fmt: skip


def test_the_table_of_what_was_only_compiled_has_what_its_binaries_need(gained: Result) -> None:
    launches = tuple(Launch(name="kernel", registers=n, spilled=8 * n, local=0, shared=100 - n) for n in (40, 64))
    record = gained.record.model_copy(update={"how": "modelled, not run", "eager": None, "launches": launches})
    lines = printed(Result(record, None, gained.study))
    assert lines[0] == "schedules for cpu: compiled; times modelled, not run"
    assert lines[1:3] == ["default best gain", "op (model) (model) (model) regs spilled shared trials"]
    assert lines[3:] == ["address_decode 2.00 ms 1.00 ms 2.00× 64 512 60 8", "backward 3 failed", "R=512"]
    assert report.cells(Result(record, None, gained.study))[4:8] == ("2", "64", "512", "60")


def test_the_page_lists_the_trials_and_why_some_failed(tmp_path: Path, gained: Result, stays: Result) -> None:
    report.write([gained, stays], tmp_path / "report.html")
    page = (tmp_path / "report.html").read_text(encoding="utf-8")
    assert "<h1>RAM-Net tuned for cpu</h1>" in page
    assert "<p>a &lt;processor&gt;; apache-tvm" in page
    assert "<tr>" + "".join(f"<th>{name}</th>" for name in report.COLUMNS) + "</tr>" in page
    assert f"<td>{WORKLOAD.name}</td><td>2.00 ms</td><td>1.00 ms</td><td>20.0 ms</td><td>2.00× ± 0.00</td>" in page
    assert "<td>lanes=8 parallel=False</td><td>8</td><td>2 build_error, 1 run_error</td>" in page
    assert f"<td>lanes={DEFAULT.lanes} parallel={DEFAULT.parallel} (default)</td><td>1</td><td>none</td>" in page
    first, second = page.split("<h2>")[1:]
    assert first.count("data:image/png;base64,") == 2 and "No pictures" not in first
    assert first.count("<td>no such &lt;vector&gt;</td>") == 2 and first.count("<td>out of luck</td>") == 1
    failed = sum(first.count(f"<td>{status}</td>") for status in ("build_error", "run_error", "refused"))
    assert f"<summary>{failed} failed or refused</summary>" in first and failed >= 3
    assert "<p>No pictures: fewer than 4 schedules came to a gain.</p>" in second
    assert "<p>No trial failed.</p>" in second


def test_a_plot_that_optuna_cannot_draw_is_a_sentence(
    tmp_path: Path, gained: Result, monkeypatch: pytest.MonkeyPatch
) -> None:
    def draw(*_: object) -> None:
        raise ValueError("no two <gains> differ")

    monkeypatch.setattr("optuna.visualization.matplotlib.plot_param_importances", draw)
    report.write([gained], tmp_path / "report.html")
    page = (tmp_path / "report.html").read_text(encoding="utf-8")
    assert page.count("data:image/png;base64,") == 1
    assert "<p>Importance of the knobs: no picture; no two &lt;gains&gt; differ</p>" in page
