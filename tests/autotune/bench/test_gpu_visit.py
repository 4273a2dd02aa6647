"""A visit to a GPU: stages that fail, hang or are killed keep what the others and they themselves have found."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner

from autotune.bench.gpu import part_process, visit
from autotune.bench.gpu.run import GpuRun
from autotune.bench.gpu.together import together
from autotune.bench.gpu.visit import Found, Stage, Visit
from autotune.bench.run import Table
from tests.autotune.bench.tables import BESIDE_GLA, SCAN


@pytest.fixture
def at(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Visit:
    (tmp_path / "files" / "records").mkdir(parents=True)
    (tmp_path / "output").mkdir()
    monkeypatch.setenv("RAMNET_VISIT_TESTS", "")  # set by each stage; restored afterwards
    return Visit("h100", "cpu", 5.0, tmp_path / "output", tmp_path / "files")


def program(table: Table, then: str = "") -> list[str]:
    """Return a command that reports a table as a part of the benchmark does, and goes on with ``then``."""
    run = GpuRun("h100", device="cpu")
    run.tables = [table]
    return [sys.executable, "-c", f"import os; print({part_process.tell(run)!r}, flush=True)\n{then}"]


def stages(monkeypatch: pytest.MonkeyPatch, **commands: list[str]) -> list[str]:
    found = {
        name: Stage(1, lambda visit, limit, name=name, command=command: {name: command})  # type: ignore[misc]
        for name, command in commands.items()
    }
    monkeypatch.setattr(visit, "STAGES", found)
    return list(found)


def written(at: Visit) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((at.output / "visit.json").read_text())
    return found


def test_a_stage_that_fails_and_one_that_is_killed_leave_the_rest(at: Visit, monkeypatch: pytest.MonkeyPatch) -> None:
    said: list[str] = []
    names = stages(
        monkeypatch,
        fails=program(SCAN, "raise SystemExit('no such kernel')"),
        killed=program(BESIDE_GLA, "os.kill(os.getpid(), 9)"),
        absent=["/no/such/program"],
        last=program(SCAN),
    )
    visit.run(at, names, said.append)
    found = {each["name"]: each for each in written(at)["stages"]}
    assert [found[name]["status"] for name in names] == ["failed", "failed", "failed", "ok"]
    assert found["fails"]["summary"] == "fails: no such kernel"
    assert [table["name"] for table in found["killed"]["tables"]] == [BESIDE_GLA.name], "finished tables are kept"
    assert "No such file" in found["absent"]["summary"]
    goals = {goal["name"]: goal["verdict"] for goal in written(at)["goals"]}
    assert goals["memory_scan forward + backward, tuned, over chunk_gla"] == "met"
    assert [line.partition(":")[0] for line in said] == names, "each stage has a line"
    assert "no such kernel" in (at.output / "visit.log").read_text()
    assert BESIDE_GLA.name in (at.output / "visit.md").read_text()


def test_a_signal_ends_the_running_stage_and_the_others_are_left_out(
    at: Visit, monkeypatch: pytest.MonkeyPatch
) -> None:
    write = visit.write

    def stop(*arguments: Any) -> None:
        """What is found is also written during a stage; then the signal comes."""
        write(*arguments)
        at.stopped = at.stopped or written(at)["stages"][0]["tables"] != []

    monkeypatch.setattr(visit, "write", stop)
    monkeypatch.setattr(visit, "INTERVAL", 0.0)
    names = stages(monkeypatch, hangs=program(SCAN, "import threading; threading.Event().wait()"), late=program(SCAN))
    visit.run(at, names, lambda line: None)
    first, second = written(at)["stages"]
    assert (first["status"], [table["name"] for table in first["tables"]]) == ("stopped", [SCAN.name])
    assert second["status"] == "left out"


def test_commands_that_take_too_long_are_ended_with_what_they_have_started(tmp_path: Path) -> None:
    wait = "import threading; threading.Event().wait()"
    starts = f"import subprocess, sys; subprocess.Popen([sys.executable, '-c', {wait!r}]); {wait}"
    assert together({"slow": [sys.executable, "-c", starts]}, 0.0, tmp_path, groups=True) == {"slow": None}
    commands = {"good": [sys.executable, "-c", ""], "bad": [sys.executable, "-c", "raise SystemExit(3)"]}
    assert together(commands, 600.0, tmp_path) == {"good": 0, "bad": 3}


def test_the_time_is_shared_and_what_a_stage_leaves_goes_to_the_next() -> None:
    whole = sum(stage.seconds for stage in visit.STAGES.values())
    names = list(visit.STAGES)
    assert visit.limits(names, whole) == visit.STAGES[names[0]].seconds
    assert visit.limits(names, whole / 2) == visit.STAGES[names[0]].seconds / 2
    assert visit.limits(names[-1:], 77.0) == 77.0


def test_no_stage_begins_when_the_time_is_over(at: Visit, monkeypatch: pytest.MonkeyPatch) -> None:
    at.minutes = 0.001
    visit.run(at, stages(monkeypatch, only=program(SCAN)), lambda line: None)
    assert [stage["status"] for stage in written(at)["stages"]] == ["left out"]


def test_tests_report_each_result_as_soon_as_it_is_known(tmp_path: Path) -> None:
    (tmp_path / "test_some.py").write_text(
        "import os, pytest\ndef test_good(): pass\ndef test_bad(): assert 0.25 < 0.125\n"
        "@pytest.mark.skip\ndef test_skipped(): pass\ndef test_crash(): os._exit(1)\n"
    )
    results = tmp_path / "tests.jsonl"
    command = [
        sys.executable,
        "-m",
        "pytest",
        "-p",
        "tests.gpu.each_result",
        "-p",
        "no:cacheprovider",
        "-p",
        "no:xdist",
    ]
    command += ["--rootdir", str(tmp_path), "-c", "/dev/null", str(tmp_path / "test_some.py")]
    env = {"RAMNET_VISIT_TESTS": str(results), "PATH": "", "PYTEST_DISABLE_PLUGIN_AUTOLOAD": "1"}
    subprocess.run(command, check=False, capture_output=True, env=env, cwd=Path(__file__).parents[3])
    with results.open("a") as file:
        file.write('{"test": "half a li')
    found = Found("tests", "failed", 0, 0)
    visit._read_tests(found, results)
    assert found.summary == "1 passed, 1 failed, 1 skipped"
    assert "test_bad" in found.notices[0] and "assert 0.25 < 0.125" in found.notices[0]


def test_an_earlier_visit_is_continued(at: Visit, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    earlier = tmp_path / "earlier"
    earlier.mkdir()
    with pytest.raises(ValueError, match=r"has no visit\.json"):
        visit.resume(at, earlier)
    (at.folder / "records" / "h100.jsonl").write_text("a record\n")
    (at.folder / "records" / ".h100.jsonl.lock").write_text("")
    visit.run(at, stages(monkeypatch, one=program(BESIDE_GLA)), lambda line: None)
    assert sorted(path.name for path in at.output.iterdir()) == ["h100.jsonl", "visit.json", "visit.log", "visit.md"]
    at.output.rename(tmp_path / "earlier")
    at.output.mkdir()
    (tmp_path / "again" / "records").mkdir(parents=True)
    again = Visit("h100", "cpu", 5.0, at.output, tmp_path / "again")
    visit.resume(again, earlier)
    visit.run(again, stages(monkeypatch, two=program(SCAN)), lambda line: None)
    assert [stage["name"] for stage in written(again)["stages"]] == ["one", "two"]
    assert (again.output / "h100.jsonl").read_text() == "a record\n"


def test_a_visit_needs_a_gpu_and_known_stages(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    words = ["--minutes", "1", "--output", str(tmp_path / "new")]
    assert "there is no GPU here" in str(CliRunner().invoke(visit.visit, words).exception)
    unknown = CliRunner().invoke(visit.visit, [*words, "--stages", "smoke,tets"]).exception
    assert str(unknown).startswith("stage 'tets' is unknown; there are smoke, tests, scan")


def test_a_dry_run_interprets_tiny_kernels(tmp_path: Path) -> None:
    """Two parts in one process; ``--dry-run`` runs all of them, each in a process of its own."""
    program = """if True:
        import math
        from autotune.bench.gpu import dry_run, part_process
        from autotune.bench.gpu.run import GpuRun
        for name, part in dry_run.parts().items():
            if name in ("decode", "position"):
                part(run := GpuRun("h100", True, device="cpu", seconds=math.inf))
                print(name, sum(len(table.rows) for table in run.tables), run.tables[0].failed)
    """
    done = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, check=False, cwd=Path(__file__).parents[3],
        env={"TRITON_INTERPRET": "1", "PATH": "", "RAMNET_RECORDS": str(tmp_path), "HOME": str(tmp_path)},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    timed = {line.split()[0]: int(line.split()[1]) for line in done.stdout.splitlines()}
    assert timed["position"] == 2 and timed["decode"] >= 1, done.stdout
