"""The benchmark's tables, goals and files."""

import json
import math
import re
from contextlib import nullcontext
from functools import partial

import numpy as np
import pytest
import torch
from click.testing import CliRunner
from rich.console import Console

from autotune.bench.cli import bench
from autotune.bench.cpu import language_model, ops, token
from autotune.bench.cpu.goals import goals
from autotune.bench.cpu.peak_memory import Peak
from autotune.bench.goal import Goal
from autotune.bench.report import COLOURS, Report, kind_of, save, show
from autotune.bench.run import DEFAULT, FLOOR, TUNED, Row, Run, Table
from autotune.measure.bandwidth import Reader
from autotune.measure.timing import Timing
from export.c.session import CModel
from ramnet.console import duration
from tests.lowering.aot.c_library import TINY, model_of


def table(name, base, **times):
    rows = [Row(form, seconds, 0.1, seconds / times[base], 0.2, 7, 70, 7 * (seconds / times[base],))
            for form, seconds in times.items()]  # fmt: skip
    return Table(name, "M=1", 1, base, rows)


SCAN = table("memory_scan", TUNED, **{"eager, in place": 0.2, "plain C++": 0.003, TUNED: 0.002, FLOOR: 0.001})


def goal(name, tables, peak=None):
    return next(goal for goal in goals({table.name: table for table in tables}, peak) if goal.name == name)


def test_a_goal_is_measured_against_its_bound():
    eager = goal("memory_scan, tuned, over eager, in place", [SCAN])
    assert (eager.measured, eager.spread, eager.verdict) == (pytest.approx(100), 0, "met")
    floor = goal("memory_scan, tuned, over the floor", [SCAN])
    assert (floor.measured, floor.verdict) == (pytest.approx(2.0), "met")
    slow = table("memory_scan", TUNED, **{TUNED: 3.1, FLOOR: 1})
    assert goal("memory_scan, tuned, over the floor", [slow]).verdict == "not met"


@pytest.mark.parametrize(
    ("measured", "spread", "at_least", "verdict"),
    [
        (2.37, 0.08, False, "not decided"), (2.5, 0.08, False, "not decided"), (2.37, 0.01, False, "met"),
        (2.37, 0.01, True, "not met"), (3.0, 0.1, True, "met"), (3.0, 0.1, False, "not met"),
        (2.4, None, False, "met"), (2.4, None, True, "met"), (2.41, None, False, "not met"),
        (None, None, True, "not measured"),
    ],
)  # fmt: skip
def test_a_goal_whose_spread_exceeds_the_distance_to_its_bound_is_not_decided(measured, spread, at_least, verdict):
    assert Goal("a goal", 2.4, at_least, measured, spread).verdict == verdict


def test_a_goal_whose_forms_were_not_timed_together_is_not_measured():
    without_kernels = table("memory_scan", "plain C++", **{"eager, in place": 0.2, "plain C++": 0.003, FLOOR: 0.001})
    for tables in ([], [without_kernels]):
        unknown = goal("memory_scan, tuned, over eager, in place", tables)
        assert (unknown.measured, unknown.verdict) == (None, "not measured")


def test_the_goals_of_a_token_are_over_reading_the_weights_of_its_precision():
    times = {"library float32": 4.2, "floor float32": 4.0, "library int8": 1.5, "floor int8": 1.0}
    tokens = table("token 340m", token.BASE, **times)
    found = {precision: goal(f"token of 340m in {precision} over reading its weights", [tokens]) for precision in
             ("float32", "int8", "bfloat16")}  # fmt: skip
    assert (found["float32"].measured, found["float32"].spread) == (pytest.approx(1.05), 0)
    assert (found["int8"].measured, found["int8"].bound) == (pytest.approx(1.5), 1.35)
    assert found["bfloat16"].verdict == "not measured"
    assert goal("token of 340m in int8 over float32", [tokens]).measured == pytest.approx(2.8)
    tiny = table("token tiny", token.BASE, **{token.BASE: 30e-6, token.ONNX: 240e-6})
    assert goal("token of tiny in the library over onnxruntime", [tiny]).measured == pytest.approx(8)
    assert goal("token of tiny in the library, µs", [tiny]).measured == pytest.approx(30)


def test_forms_are_paired_by_rounds_or_if_they_had_other_rounds_by_the_base():
    def row(form, ratio, spread, ratios):
        return Row(form, 1.0, 0.1, ratio, spread, len(ratios), 1, ratios)

    rows = [row("base", 1.0, 0.0, (1.0, 1.0, 1.0)), row("one", 2.0, 0.5, (1.0, 2.0, 4.0)),
            row("two", 3.0, 0.4, (2.0, 4.0, 3.0)), row("slow", 6.0, 0.3, (6.0,))]  # fmt: skip
    found = Table("t", "", 1, "base", rows)
    assert found.ratio("one", "two") == (0.5, pytest.approx(5 / 6))
    assert found.ratio("slow", "one") == (3.0, pytest.approx(math.hypot(0.3, 0.5)))
    assert found.ratio("slow", "none") is None


def test_the_memory_goal_is_bytes_over_budget():
    name = "memory of a training step's scan, T = 1024, over inputs, outputs and two rows a pair"
    assert goal(name, [], Peak(90, 100)).verdict == "met"
    assert goal(name, [], Peak(101, 100)).verdict == "not met"


def test_the_report_is_written_whole_and_shown(tmp_path):
    report = Report([SCAN], goals({"memory_scan": SCAN}, None), {"bandwidth": 1e11}, ["nothing left out"])
    paths = save(report, tmp_path / "new")
    assert sorted(path.name for path in (tmp_path / "new").iterdir()) == ["bench.json", "bench.md", "bench.png"]
    assert paths[2].read_bytes().startswith(b"\x89PNG")
    read = json.loads(paths[0].read_text())
    assert read["tables"][0]["rows"][0] == {
        "form": "eager, in place", "seconds": 0.2, "spread": 0.1, "ratio": 100.0, "ratio_spread": 0.2,
        "rounds": 7, "runs": 70, "ratios": 7 * [100.0],
    }  # fmt: skip
    assert read["goals"][0]["verdict"] == "met"
    assert read["machine"]["torch"] == torch.__version__
    console = Console(record=True, width=150)
    show(report, console)
    text = console.export_text()
    assert "200 ms" in text
    assert "100×" in text
    assert "note: nothing left out" in text


def test_bars_have_error_bars_and_each_kind_has_one_colour(tmp_path, monkeypatch):
    drawn = []
    monkeypatch.setattr("matplotlib.figure.Figure.savefig", lambda figure, path, **_: (
        drawn.append(figure), path.write_bytes(b"")))  # fmt: skip
    other_base = table("memory_scan", FLOOR, **{"eager, in place": 0.2, TUNED: 0.002, FLOOR: 0.001})
    save(Report([SCAN, other_base], [], {}, []), tmp_path)
    meanings = {}
    for axes, shown in zip(drawn[0].axes, (SCAN, other_base), strict=True):
        bars, labels = axes.containers, [label.get_text() for label in axes.get_yticklabels()]
        (rectangles,) = (bar for bar in bars if hasattr(bar, "patches"))
        segments = rectangles.errorbar.lines[2][0].get_segments()
        for label, rectangle, segment in zip(labels, rectangles.patches, segments, strict=True):
            meanings.setdefault(rectangle.get_facecolor(), set()).add(kind_of(label))
            row = shown.row(label)
            assert segment[1][0] - segment[0][0] == pytest.approx(row.seconds * row.spread)
    assert len(meanings) == 3 and all(len(kinds) == 1 for kinds in meanings.values())
    (legend,) = drawn[0].legends
    assert [text.get_text() for text in legend.get_texts()] == [*COLOURS]


@pytest.fixture
def run(monkeypatch):
    """A run without kernels, in which each form takes its index in its group in seconds; ``read`` records bytes."""

    def interleaved(calls, rounds, seconds, clock):
        for call in calls.values():
            call()
        run.groups.append(list(calls))
        return {name: Timing((float(i),) * rounds, 10 * rounds) for i, name in enumerate(calls, start=1)}

    run = Run(quick=True)
    run.kernels, run.groups, run.read = {}, [], []
    monkeypatch.setattr("autotune.bench.run.interleaved", interleaved)
    monkeypatch.setattr("autotune.bench.run.reader", lambda level, threads: Reader(run.read.append, 1e11, "loop 1"))
    monkeypatch.setattr(ops, "_plain_cpp", lambda *_: {})
    return run


def test_a_token_is_compared_in_each_precision_with_reading_its_weights(run, monkeypatch):
    pytest.importorskip("tvm", reason="the library needs tvm: pip install 'ramnet[tvm]'")
    model = model_of(TINY)
    monkeypatch.setattr(token, "make_model", lambda preset: model)
    monkeypatch.setattr(token, "_ROUNDING", {"float32": 1e-4})
    run.kernels = {TUNED: nullcontext}
    found = token.token(run, "tiny", 1, tokens=2, others=False, floors=True)
    assert run.groups == [["library float32", "floor float32"]]
    assert [(row.form, row.seconds) for row in found.rows] == [("library float32", 1 / 2), ("floor float32", 2 / 2)]
    read = 4 * sum(x.numel() for name, x in model.named_parameters() if not name.startswith("embedding."))
    assert run.read == [2 * read]
    monkeypatch.setattr(CModel, "token", lambda *_: np.zeros(256, np.float32))
    with pytest.raises(ValueError, match="library float32 is wrong: its result 0 is off by 1"):
        token.token(run, "tiny", 1, tokens=2, others=False, floors=True)


def test_a_group_times_its_forms_in_turn_and_slow_ones_separately(run):
    found = ops.memory_step(run, tokens=2)
    assert run.groups == [["eager, in place", "eager, one gather", FLOOR], ["eager, slots", "eager, one gather"]]
    assert [(row.form, row.seconds, row.ratio, row.rounds, row.runs) for row in found.rows] == [
        ("eager, slots", 1 / 2, 1 / 2, 3, 30),
        ("eager, in place", 1 / 2, 1 / 2, 7, 70),
        ("eager, one gather", 2 / 2, 1.0, 7, 70),
        (FLOOR, 3 / 2, 3 / 2, 7, 70),
    ]
    assert found.base == "eager, one gather", "the last of the forms where there are no kernels"
    assert run.read == [3 * (16 * 2 * 8) * (64 * 4)], "three rows a pair"
    assert run.facts == {"L2 read bandwidth, threads=1, bytes/s": 1e11}
    assert run.notices == ["torch.compile left out of a quick run"]


def test_a_group_checks_its_forms_before_it_times_any(run, monkeypatch):
    right = ops.eager_memory_step.in_place
    monkeypatch.setattr(ops.eager_memory_step, "in_place", lambda *x: right(*x) * 1.001)
    with pytest.raises(ValueError, match=r"in place is wrong: its result 0 is off by 1\.0e-03; 1e-05 is allowed"):
        ops.memory_step(run, tokens=2)
    assert not run.groups


@pytest.mark.parametrize(
    ("group", "base", "of"),
    [
        (partial(language_model.decode, preset="tiny", threads=1), FLOOR, "batch 1, 0 MB of weights a token"),
        (partial(language_model.prefill, preset="tiny", batch=2, tokens=5, threads=1), TUNED, "batch 2, 5 tokens"),
        (
            partial(language_model.training_step, preset="tiny", batch=2, tokens=5, threads=1),
            TUNED,
            "batch 2, 5 tokens",
        ),
    ],
    ids=["decode", "prefill", "training step"],
)
def test_the_model_is_timed_on_the_reference_and_on_each_of_the_kernels(run, tiny, group, base, of):
    run.kernels = {DEFAULT: nullcontext, TUNED: nullcontext}
    found = group(run, preset="tiny", threads=1)
    compiled = {language_model.COMPILED} if base == FLOOR else set()  # in a quick run only tokens in place are
    assert {row.form for row in found.rows} == {language_model.EAGER, DEFAULT, TUNED, base} | compiled
    assert (found.base, found.what, found.failed) == (base, of, {})


def test_durations_have_digits():
    assert [duration(x) for x in (12.345, 0.0123456, 4.2e-6, 1e-9)] == ["12.3 s", "12.3 ms", "4.20 µs", "1.00 ns"]


def test_every_option_is_explained():
    text = CliRunner().invoke(bench, ["--help"]).output
    for option in ("--target", "--quick", "--output", "--threads", "--part", "--peers"):
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
def test_unwritable_and_unreadable_paths_are_refused_before_measuring(tmp_path, monkeypatch, taken, sentence):
    path = tmp_path / taken
    path.parent.mkdir(exist_ok=True, parents=True)
    path.mkdir() if taken.endswith("/") else path.write_text("a letter")
    monkeypatch.setenv("RAMNET_RECORDS", str(tmp_path / "records"))
    monkeypatch.setattr("autotune.bench.cpu.everything.measure", lambda *_: pytest.fail("something was measured"))
    before = sorted(tmp_path.rglob("*"))
    result = CliRunner().invoke(bench, ["--quick", "--output", str(tmp_path / "runs" / "new")])
    assert isinstance(result.exception, (ValueError, OSError))
    assert re.search(sentence, str(result.exception))
    assert sorted(tmp_path.rglob("*")) == before


def test_an_unknown_target_is_refused_before_anything_is_measured(tmp_path):
    result = CliRunner().invoke(bench, ["--target", "toaster", "--output", str(tmp_path / "new")])
    assert isinstance(result.exception, ValueError)
    assert "toaster" in str(result.exception)
    assert not list(tmp_path.iterdir())
