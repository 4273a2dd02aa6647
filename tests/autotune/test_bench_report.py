"""The benchmark's tables, goals and files."""

import json
import re

import pytest
import torch
from click.testing import CliRunner
from rich.console import Console

from autotune.bench import ops
from autotune.bench.cli import bench
from autotune.bench.goals import goals
from autotune.bench.peak import Peak
from autotune.bench.report import Report, duration, save, show
from autotune.bench.run import FLOOR, TUNED, Row, Run, Table


def table(name, base, **times):
    rows = [Row(form, seconds, 0.1, seconds / times[base], 0.2, 7, 70) for form, seconds in times.items()]
    return Table(name, "M=1", 1, base, rows)


SCAN = table("memory_scan", TUNED, **{"eager, in place": 0.2, "plain C++": 0.003, TUNED: 0.002, FLOOR: 0.001})


def goal(name, tables, peak=None):
    return next(goal for goal in goals({table.name: table for table in tables}, peak) if goal.name == name)


def test_a_goal_is_measured_against_its_bound():
    eager = goal("memory_scan, tuned, over eager, in place", [SCAN])
    assert (eager.measured, eager.spread, eager.met) == (pytest.approx(100), 0.2, True)
    floor = goal("memory_scan, tuned, over the floor", [SCAN])
    assert (floor.measured, floor.met) == (pytest.approx(2.0), True)
    assert (
        goal("memory_scan, tuned, over the floor", [table("memory_scan", TUNED, **{TUNED: 3, FLOOR: 1})]).met is False
    )


def test_a_goal_whose_forms_were_not_timed_together_is_not_measured():
    without_kernels = table("memory_scan", "plain C++", **{"eager, in place": 0.2, "plain C++": 0.003, FLOOR: 0.001})
    for tables in ([], [without_kernels]):
        unknown = goal("memory_scan, tuned, over eager, in place", tables)
        assert (unknown.measured, unknown.met) == (None, None)


def test_the_memory_goal_is_bytes_over_budget():
    name = "memory of a training step's scan, T = 1024, over inputs, outputs and two rows a pair"
    assert goal(name, [], Peak(90, 100)).met is True
    assert goal(name, [], Peak(101, 100)).met is False


def test_the_report_is_written_whole_and_shown(tmp_path):
    report = Report([SCAN], goals({"memory_scan": SCAN}, None), {"bandwidth": 1e11}, ["nothing left out"])
    paths = save(report, tmp_path / "new")
    assert sorted(path.name for path in (tmp_path / "new").iterdir()) == ["bench.json", "bench.md", "bench.png"]
    assert paths[2].read_bytes().startswith(b"\x89PNG")
    read = json.loads(paths[0].read_text())
    assert read["tables"][0]["rows"][0] == {
        "form": "eager, in place", "seconds": 0.2, "spread": 0.1, "ratio": 100.0, "ratio_spread": 0.2,
        "rounds": 7, "runs": 70,
    }  # fmt: skip
    assert read["goals"][0]["met"] is True
    assert read["machine"]["torch"] == torch.__version__
    console = Console(record=True, width=150)
    show(report, console)
    text = console.export_text()
    assert "200 ms" in text
    assert "100×" in text
    assert "note: nothing left out" in text


def test_a_group_checks_and_times_its_forms():
    run = Run(quick=True)
    run.kernels = {}
    found = ops.memory_step(run, tokens=2)
    assert [row.form for row in found.rows][:3] == ["eager, slots", "eager, in place", "eager, one gather"]
    assert found.rows[-1].form == FLOOR
    assert all(row.seconds > 0 and row.runs >= row.rounds >= 3 for row in found.rows)
    assert found.row(found.base).ratio == 1.0
    assert found.row(FLOOR).ratio < 1 < found.row("eager, slots").ratio
    assert "torch.compile left out of a quick run" in run.notices
    assert any("L2 read bandwidth" in fact for fact in run.facts)


def test_durations_have_three_digits():
    assert [duration(x) for x in (12.345, 0.0123456, 4.2e-6, 1e-9)] == ["12.3 s", "12.3 ms", "4.20 µs", "1.00 ns"]


def test_every_option_is_explained():
    text = CliRunner().invoke(bench, ["--help"]).output
    for option in ("--target", "--quick", "--output", "--threads"):
        line = next(line for line in text.splitlines() if option in line)
        assert len(line.split()) > 3


def test_an_output_that_is_a_file_is_refused(tmp_path):
    (tmp_path / "taken").write_text("")
    result = CliRunner().invoke(bench, ["--quick", "--output", str(tmp_path / "taken")])
    assert result.exit_code != 0
    assert "taken" in result.output


@pytest.mark.parametrize(
    ("taken", "sentence"),
    [
        ("runs/new/bench.json/", "bench.json is a folder; it must be a file"),
        ("runs", "bench.json cannot be written: Not a directory"),
        ("records", "RAMNET_RECORDS is .*records, which is not a folder"),
        ("records/cpu.jsonl", r"cpu\.jsonl, line 1, is not a record"),
    ],
)
def test_what_cannot_be_written_or_read_is_found_out_before_anything_is_measured(
    tmp_path, monkeypatch, taken, sentence
):
    path = tmp_path / taken
    path.parent.mkdir(exist_ok=True, parents=True)
    path.mkdir() if taken.endswith("/") else path.write_text("a letter")
    monkeypatch.setenv("RAMNET_RECORDS", str(tmp_path / "records"))
    monkeypatch.setattr("autotune.bench.everything.measure", lambda *_: pytest.fail("something was measured"))
    before = sorted(tmp_path.rglob("*"))
    result = CliRunner().invoke(bench, ["--quick", "--output", str(tmp_path / "runs" / "new")])
    assert isinstance(result.exception, (ValueError, OSError))
    assert re.search(sentence, str(result.exception))
    assert sorted(tmp_path.rglob("*")) == before


def test_an_unknown_target_is_refused_before_anything_is_measured(tmp_path):
    pytest.importorskip("tvm")
    result = CliRunner().invoke(bench, ["--target", "toaster", "--output", str(tmp_path / "new")])
    assert isinstance(result.exception, ValueError)
    assert "toaster" in str(result.exception)
    assert not list(tmp_path.iterdir())
