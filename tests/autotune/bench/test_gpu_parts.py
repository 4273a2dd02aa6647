"""The parts of a GPU's benchmark, each in a separate process; its report; its command."""

from __future__ import annotations

import json
import re
import subprocess
from pathlib import Path
from typing import Any

import pytest
import torch
from click.testing import CliRunner
from rich.console import Console

from autotune.bench import report
from autotune.bench.cli import bench
from autotune.bench.gpu import everything, part_process, scan, warm
from autotune.bench.gpu.goals import goals
from autotune.bench.gpu.run import NO_FLA, GpuRun
from autotune.bench.run import TUNED, Run, Table
from tests.autotune.bench.tables import BESIDE_GLA, SCAN, table


@pytest.fixture
def run() -> GpuRun:
    return GpuRun("h200", quick=True, device="cpu")


def test_a_part_that_fails_keeps_its_finished_tables_and_does_not_affect_others() -> None:
    def measured(run: Run, part: str, seconds: float) -> list[Table]:
        if part == "attention":
            raise part_process.PartError("CUDA error: an illegal memory access was encountered", [BESIDE_GLA])
        return [SCAN] if part == "scan" else []

    *_, found = everything.measure(Run("h200"), parts=["scan", "attention", "decode"], measured=measured)
    assert [x.name for x in found.tables] == [scan.NAME, scan.GLA_NAME, "attention"]
    assert found.tables[2].failed == {"all": "CUDA error: an illegal memory access was encountered"}
    assert set(found.facts) == {f"seconds that {part} took" for part in ("scan", "attention", "decode")}


def test_parts_that_would_begin_too_late_are_left_out() -> None:
    *_, found = everything.measure(Run("h200"), parts=["scan", "decode"], seconds=0, measured=lambda *_: [SCAN])
    assert [x.failed for x in found.tables] == [{"all": "left out: 0 s had passed"}] * 2


def said_by(run: GpuRun) -> bytes:
    """A part's output with two tables, the second of which is incomplete, among what libraries print."""
    run.tables, run.facts, run.notices = [SCAN], {"fact": 1.5}, ["noted"]
    return f"chatter\n{part_process.tell(run)}\nchatter\n".encode()


def test_a_part_comes_back_from_its_process(run: GpuRun, monkeypatch: pytest.MonkeyPatch) -> None:
    done = subprocess.CompletedProcess([], 0, said_by(run), b"")
    monkeypatch.setattr(subprocess, "run", lambda *_, **__: done)
    parent = Run("h200")
    assert part_process.measured(parent, "scan", 9.0) == [SCAN]
    assert (parent.facts, parent.notices) == ({"fact": 1.5}, ["noted"])


def test_a_part_reports_each_finished_table(run: GpuRun) -> None:
    told: list[list[str]] = []
    run.on_table = lambda run: told.append([table.name for table in run.tables])
    for name in ("one", "two"):
        run.table(name, "what", {"form": lambda: list}, base="form")
    assert told == [["one"], ["one", "two"]]


def test_forms_that_would_be_built_too_late_are_left_out(run: GpuRun) -> None:
    run.begin -= run.seconds
    table = run.table("name", "what", {"first": lambda: list, "late": lambda: list}, base="first")
    assert [row.form for row in table.rows] == ["first"], "one form is timed in any case"
    assert re.fullmatch(r"left out: \d+ of the part's 150 s had passed", table.failed["late"])


def test_the_last_line_of_a_part_that_fails_is_its_reason(run: GpuRun, monkeypatch: pytest.MonkeyPatch) -> None:
    done = subprocess.CompletedProcess([], 1, said_by(run), b"step\nout of memory\n")
    monkeypatch.setattr(subprocess, "run", lambda *_, **__: done)
    with pytest.raises(part_process.PartError, match=r"^out of memory$") as caught:
        part_process.measured(Run("h200"), "scan", 9.0)
    assert caught.value.tables == [SCAN]


def test_a_part_that_hangs_is_killed_and_its_finished_tables_are_kept(
    run: GpuRun, monkeypatch: pytest.MonkeyPatch
) -> None:
    said = said_by(run)

    def hang(command: Any, timeout: float, **_: Any) -> Any:
        raise subprocess.TimeoutExpired(command, timeout, said, b"checking GLA\n")

    monkeypatch.setattr(subprocess, "run", hang)
    with pytest.raises(part_process.PartError, match=r"took longer than 9 s; at last: checking GLA") as caught:
        part_process.measured(Run("h200"), "scan", 9.0)
    assert caught.value.tables == [SCAN]


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_the_process_of_a_part_without_a_gpu_says_so_in_one_line() -> None:
    with pytest.raises(part_process.PartError) as caught:
        part_process.measured(Run("h200"), "spills", 600.0)
    assert re.fullmatch("Torch not compiled with CUDA enabled|.*NVIDIA driver.*|.*No CUDA GPUs.*", str(caught.value))
    assert caught.value.tables == []


def test_the_report_says_what_failed(tmp_path: Path) -> None:
    failing = table(scan.NAME, TUNED, {TUNED: 2.0}, **{scan.GLA: NO_FLA})
    empty = Table("decode", "the whole part", 1, "", [], {"all": "out of memory"})
    found = report.Report([failing, empty], goals({failing.name: failing}, {}), {"fact": 2.0}, ["note"])
    paths = report.save(found, tmp_path)
    assert [path.name for path in paths] == ["bench.json", "bench.md", "bench.png"]
    assert json.loads(paths[0].read_text())["tables"][1]["failed"] == {"all": "out of memory"}
    text = paths[1].read_text()
    assert f"| {scan.GLA} | {NO_FLA} |" in text and "| all | out of memory |" in text
    assert "not measured" in text and "- fact: 2" in text
    console = Console(record=True, width=200)
    report.show(found, console)
    assert NO_FLA in console.export_text()


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_without_a_gpu_one_sentence_says_so(tmp_path: Path) -> None:
    result = CliRunner().invoke(bench, ["--target", "h200", "--output", str(tmp_path / "new")])
    assert isinstance(result.exception, RuntimeError) and "there is no GPU here for target 'h200'" in str(
        result.exception
    )
    assert not list(tmp_path.iterdir())


def test_a_target_that_is_another_gpu_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    from lowering import targets

    monkeypatch.setattr(targets, "here", lambda: targets.find("h100"))
    everything.check_target("h100")
    with pytest.raises(ValueError, match="'h200' is not this machine's GPU: that is h100"):
        everything.check_target("h200")
    with pytest.raises(ValueError, match="'cpu' is not a GPU"):
        everything.check_target("cpu")


def test_the_command_writes_after_each_part(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    written = []

    def measured(run: Run, part: str, seconds: float) -> list[Table]:
        written.append((part, (tmp_path / "bench.json").exists()))
        return [SCAN] if part == "scan" else []

    monkeypatch.setattr(everything, "check_target", lambda target: None)
    monkeypatch.setattr(
        part_process, "PARTS", {part: part_process.PARTS[part] for part in ("scan", "decode", "spills")}
    )
    monkeypatch.setattr(
        everything.measure, "__kwdefaults__", {**everything.measure.__kwdefaults__, "measured": measured}
    )
    result = CliRunner().invoke(bench, ["--target", "h200", "--output", str(tmp_path)])
    assert result.exit_code == 0, result.output
    assert written == [("scan", False), ("decode", True), ("spills", True)]
    assert scan.CHUNKED in (tmp_path / "bench.md").read_text()


def test_single_parts_can_be_measured(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked = []
    named = {**everything.measure.__kwdefaults__, "measured": lambda run, part, seconds: asked.append(part) or []}
    monkeypatch.setattr(everything, "check_target", lambda target: None)
    monkeypatch.setattr(everything.measure, "__kwdefaults__", named)
    words = ["--target", "h200", "--output", str(tmp_path), "--part"]
    assert CliRunner().invoke(bench, [*words, "decode", "--part", "scan"]).exit_code == 0
    assert asked == ["decode", "scan"]
    unknown = CliRunner().invoke(bench, [*words, "scna"]).exception
    assert str(unknown).startswith("part 'scna' is unknown; there are scan, attention")
    on_the_cpu = CliRunner().invoke(bench, ["--part", "scan", "--output", str(tmp_path)]).exception
    assert str(on_the_cpu) == "--part scan is for GPUs and --peers; else all parts are measured on the CPU"


def test_each_process_compiles_its_share_of_the_schedules(monkeypatch: pytest.MonkeyPatch) -> None:
    triton = pytest.importorskip("triton")
    from triton.runtime.autotuner import Autotuner

    monkeypatch.setattr(Autotuner, "__init__", Autotuner.__init__)  # restored afterwards
    warm.take_share(1, 3)

    def kept(count: int) -> list[int]:
        configs = [triton.Config({"BLOCK": i}) for i in range(count)]

        @triton.autotune(configs=configs, key=["n"])
        @triton.jit
        def kernel(n, BLOCK):
            pass

        return [config.kwargs["BLOCK"] for config in kernel.configs]

    assert kept(7) == [1, 4]
    assert kept(1) == [0], "a kernel needs a schedule"


def test_without_the_library_nothing_is_compiled(run: GpuRun, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    monkeypatch.setattr(warm, "together", lambda *_: pytest.fail("a process was started"))
    assert warm.peers(run) == []


def test_processes_that_do_not_compile_their_share_are_noted(run: GpuRun, monkeypatch: pytest.MonkeyPatch) -> None:
    def ended(commands: dict[str, list[str]], seconds: float, folder: object) -> dict[str, int | None]:
        assert seconds <= warm.SHARE * run.seconds < run.seconds, "they are ended before the part is"
        assert [command[-2:] for command in commands.values()] == [[str(i), "12"] for i in range(12)]
        return {name: {"3": 1, "4": None, "5": None}.get(name, 0) for name in commands}

    monkeypatch.setattr("importlib.util.find_spec", lambda name: object())
    monkeypatch.setattr(warm, "together", ended)
    warm.peers(run)
    assert run.notices == [
        "2 of 12 processes that compile flash-linear-attention's kernels did not end in time",
        "1 of 12 processes that compile flash-linear-attention's kernels failed",
    ]
