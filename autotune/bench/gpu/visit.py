"""Everything to be done on a GPU within minutes: ``python3 -m autotune.bench.gpu.visit --minutes 9 --output DIR``.

Each stage runs in processes of its own within a time limit, so that one that fails or hangs affects no other. What is
known is written to the output folder every few seconds. docs/gpu.md describes the stages and the files.
"""

from __future__ import annotations

import json
import os
import shutil
import signal
import sys
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from time import perf_counter
from typing import Any

import click

from autotune.bench.gpu.together import together
from ramnet.cli import main
from ramnet.files import write_text_atomic
from ramnet.finite import Finite

# Seconds that are left for writing the results at the end, between two writes during a stage, and of a stage at least.
RESERVE, INTERVAL, SHORTEST = 5.0, 5.0, 1.0
# Bytes of a process's output that are kept: its beginning and its end.
MOST_OUTPUT = 200_000
TESTS = (
    "tests/gpu/test_scan.py", "tests/gpu/test_model.py", "tests/gpu/test_measuring.py",
    "tests/lowering/test_gpu_model.py", "tests/lowering/test_graphs.py",
    "tests/lowering/gpu/test_scan_slots_backward.py", "tests/lowering/gpu/test_scan_slots.py",
    "tests/lowering/gpu/test_scan_serial.py", "tests/lowering/gpu/test_decode_heads.py",
    "tests/lowering/gpu/test_address_decode.py", "tests/lowering/gpu/test_memory_step.py",
    "tests/lowering/gpu/test_slot_order.py", "tests/lowering/gpu/test_driver.py",
)  # fmt: skip
DRY_TESTS = ("tests/lowering/gpu/test_slot_order.py", "tests/gpu/test_scan.py")
WORKERS = 10

Commands = dict[str, list[str]]


@dataclass
class Found:
    """What a stage found: its end, seconds, a line of summary, and the tables, facts and notices of its parts."""

    name: str
    status: str
    seconds: float
    limit: float
    summary: str = ""
    tables: list[Any] = field(default_factory=list)
    facts: dict[str, float] = field(default_factory=dict)
    notices: list[str] = field(default_factory=list)


@dataclass
class Visit:
    """The settings of a visit. ``folder`` is for the stages' own files; the output folder has few files."""

    target: str
    device: str
    minutes: float
    output: Path
    folder: Path
    found: list[Found] = field(default_factory=list)
    stopped: bool = False  # by a signal

    def part(self, name: str, limit: float, quick: bool = True) -> list[str]:
        """Return the command of a part of the benchmark."""
        module = "autotune.bench.gpu.part_process"
        return [sys.executable, "-m", module, name, self.target, str(int(quick)), f"{limit:.1f}", self.device]

    def tests(self) -> list[str]:
        """Return the command of the tests, the longest first."""
        files = TESTS if self.device == "cuda" else DRY_TESTS
        workers = WORKERS if self.device == "cuda" else 2
        # Ten workers with a thread for every core finished no test in two minutes.
        settings = ["CUBLAS_WORKSPACE_CONFIG=:4096:8", "OMP_NUM_THREADS=1"]
        return [
            "env", *settings, sys.executable, "-m", "pytest", "-p", "tests.gpu.each_result",
            "-p", "no:cacheprovider", "--tb=short", f"--numprocesses={workers}", "--dist=load",
            "--maxschedchunk=1", *files,
        ]  # fmt: skip


@dataclass(frozen=True)
class Stage:
    """A stage: the commands that it runs side by side, and its usual seconds, which are scaled to the visit's."""

    seconds: float
    commands: Callable[[Visit, float], Commands]


def _parts(seconds: float, *names: str, quick: bool = True) -> Stage:
    return Stage(seconds, lambda visit, limit: {name: visit.part(name, limit, quick) for name in names})


STAGES: dict[str, Stage] = {
    "smoke": _parts(50, "smoke"),
    "tests": Stage(130, lambda visit, limit: {"tests": visit.tests()}),
    "scan": _parts(50, "scan"),
    "attention": _parts(25, "attention"),
    "compile": _parts(60, "peers", "candidates"),
    "gla": _parts(45, "gla"),
    "position": _parts(20, "position"),
    "decode": _parts(65, "decode", quick=False),
    "training": _parts(85, "training"),
    "ranks": _parts(60, "ranks"),
    "tune": _parts(180, "tune"),
    "tuned-scan": _parts(40, "scan"),
    "tuned-gla": _parts(45, "gla"),
    "tuned-decode": _parts(50, "decode"),
    "ncu": _parts(30, "ncu"),
}


def limits(names: Sequence[str], left: float) -> float:
    """Return the seconds of the first of the stages that are still to run, of ``left``."""
    usual = sum(STAGES[name].seconds for name in names)
    return left * STAGES[names[0]].seconds / usual


def run(visit: Visit, names: Sequence[str], say: Callable[[str], None]) -> None:
    """Run the stages, and write the results after each."""
    end = perf_counter() + 60 * visit.minutes - RESERVE
    for number, name in enumerate(names):
        # A stage that ends early leaves its time to the others.
        limit = limits(names[number:], end - perf_counter())
        if limit < SHORTEST or visit.stopped:
            found = Found(name, "left out", 0.0, limit, "the time was over")
        else:
            found = stage(visit, name, limit)
        visit.found.append(found)
        say(f"{name}: {found.status}, {found.seconds:.0f} of {limit:.0f} s; {found.summary}")
        for notice in found.notices:
            if "FAIL" in notice or "DIFFER" in notice:
                say(f"  {notice[:300]}")
        write(visit, visit.found, say)


def stage(visit: Visit, name: str, limit: float) -> Found:
    """Run one stage within ``limit`` seconds and return what it found, whatever happens."""
    place = visit.folder / f"{len(visit.found):02}-{name}"
    place.mkdir(parents=True)
    os.environ["RAMNET_VISIT_TESTS"] = str(place / "tests.jsonl")
    begin, written = perf_counter(), perf_counter()
    commands = STAGES[name].commands(visit, limit)

    def found(status: str) -> Found:
        made = Found(name, status, perf_counter() - begin, limit)
        for command in commands:
            try:
                _read(made, place, command)
            except (OSError, ValueError, KeyError, TypeError) as problem:
                made.notices.append(f"the output of {command} cannot be read: {problem}")
        return made

    def stops() -> bool:
        nonlocal written
        if perf_counter() - written > INTERVAL:
            written = perf_counter()
            write(visit, [*visit.found, found("running")])
        return visit.stopped

    try:
        ended = together(commands, limit, place, groups=True, stops=stops)
    except OSError as problem:
        return Found(name, "failed", perf_counter() - begin, limit, str(problem))
    made = found("ok")
    for command, status in ended.items():
        if status != 0:
            made.status = "stopped" if visit.stopped else "took too long" if status is None else "failed"
            last = _last_line(place / f"{command}.err", place / f"{command}.out")
            made.summary = made.summary or f"{command}: {last}"
    made.summary = made.summary or _summary(made)
    _log(visit, name, place)
    return made


def _read(found: Found, place: Path, command: str) -> None:
    """Add what a command reported."""
    from autotune.bench.gpu import part_process
    from autotune.bench.run import Run

    if command == "tests":
        _read_tests(found, place / "tests.jsonl")
        return
    reported = Run()
    tables = part_process.read(reported, (place / f"{command}.out").read_bytes())
    found.tables += [asdict(table) for table in tables]
    found.facts |= reported.facts
    found.notices += reported.notices


def _read_tests(found: Found, path: Path) -> None:
    """Add how many tests passed, and the end of each failure's text."""
    if not path.is_file():
        return
    results = [json.loads(line) for line in path.read_text(errors="replace").splitlines() if line.endswith("}")]
    failed = [each for each in results if each["outcome"] == "failed"]
    counts = {
        outcome: sum(each["outcome"] == outcome for each in results) for outcome in ("passed", "failed", "skipped")
    }
    found.facts |= {f"tests {outcome}": float(count) for outcome, count in counts.items()}
    found.notices += [f"FAILED {each['test']} ({each['seconds']:.1f} s): {each['text']}" for each in failed]
    slowest = sorted(results, key=lambda each: -each["seconds"])[:5]
    found.notices += [f"slow: {each['test']} {each['seconds']:.1f} s" for each in slowest]
    found.summary = ", ".join(f"{count} {outcome}" for outcome, count in counts.items())


def _summary(found: Found) -> str:
    """Return a line: the failed forms of the tables, else the first facts."""
    failed = [f"{form}: {why}" for table in found.tables for form, why in table["failed"].items()]
    rows = sum(len(table["rows"]) for table in found.tables)
    parts = [f"{rows} forms timed"] if rows else []
    parts += [f"{len(failed)} left out, such as {failed[0]}"] if failed else []
    parts += [f"{name} {value:.3g}" for name, value in found.facts.items() if len(parts) < 5]
    return "; ".join(parts or found.notices[:1])[:400] or "nothing to report"


def _last_line(*paths: Path) -> str:
    for path in paths:
        lines = path.read_text(errors="replace").strip().splitlines() if path.is_file() else []
        if lines:
            return lines[-1][:300]
    return "it printed nothing"


def _log(visit: Visit, name: str, place: Path) -> None:
    """Append the output of a stage's commands to the visit's log."""
    with (visit.output / "visit.log").open("ab") as log:
        for path in sorted(place.iterdir()):
            text = path.read_bytes() if path.is_file() else b""
            if len(text) > MOST_OUTPUT:
                half = MOST_OUTPUT // 2
                text = text[:half] + b"\n[...]\n" + text[-half:]
            log.write(f"\n==== {name}, {path.name}\n".encode() + text)


def write(visit: Visit, found: Sequence[Found], say: Callable[[str], None] = lambda text: None) -> None:
    """Write visit.json, with everything that was found, and visit.md, and copy the tuner's records and journal."""
    from autotune.bench.report import markdown

    try:
        report = _report(found)
        content = {
            "target": visit.target, "minutes": visit.minutes, "machine": report.machine,
            "goals": [{**asdict(goal), "verdict": goal.verdict} for goal in report.goals],
            "stages": [asdict(each) for each in found],
        }  # fmt: skip
        write_text_atomic(visit.output / "visit.json", json.dumps(content, indent=1, ensure_ascii=False) + "\n")
        write_text_atomic(visit.output / "visit.md", markdown(report))
        for path in (visit.folder / "records").glob("[!.]*"):
            write_text_atomic(visit.output / path.name, path.read_text(encoding="utf-8"))
    except (OSError, ValueError, KeyError, TypeError) as problem:  # the next stage may still tell something
        say(f"the results cannot be written: {problem}")


def _report(findings: Sequence[Found]) -> Any:
    """Return all stages' findings as a report of the benchmark. Of two tables of one name, the later one counts."""
    from autotune.bench.gpu.everything import described
    from autotune.bench.gpu.goals import goals
    from autotune.bench.report import Report
    from autotune.bench.run import Table

    tables: dict[str, Table] = {}
    facts: dict[str, float] = {}
    notices = [f"{found.name}: {found.status}, {found.seconds:.0f} s; {found.summary}" for found in findings]
    for found in findings:
        for table in found.tables:
            tables[table["name"]] = Table.from_json(table)
        facts |= found.facts
        notices += found.notices
    return Report(list(tables.values()), goals(tables, facts), facts, notices, described())


def resume(visit: Visit, earlier: Path) -> None:
    """Take over the findings, records and journal of an earlier visit. Raises ValueError if the folder has none."""
    path = earlier / "visit.json"
    if not path.is_file():
        raise ValueError(f"{earlier} has no visit.json; --resume takes the output folder of an earlier visit")
    visit.found += [Found(**found) for found in json.loads(path.read_text())["stages"]]
    for name in (f"{visit.target}.jsonl", "journal.log"):
        if (earlier / name).is_file():
            shutil.copy(earlier / name, visit.folder / "records" / name)


def _target(dry_run: bool) -> str:
    """Return the target of this machine's GPU. Raises RuntimeError without one."""
    from lowering.targets import here

    found = here()
    if found is None and not dry_run:
        raise RuntimeError("a visit measures, and there is no GPU here; --dry-run interprets tiny kernels instead")
    return "h100" if found is None else found.name


@click.command()
@click.option("--minutes", type=Finite(0, min_open=True), required=True, help="For everything.")
@click.option(
    "--output", type=click.Path(file_okay=False, path_type=Path), required=True, help="Folder of the results."
)
@click.option("--stages", default=",".join(STAGES), help="The stages to run, separated by commas.")
@click.option("--resume", "earlier", type=click.Path(exists=True, file_okay=False, path_type=Path),
              help="The output folder of an earlier visit, whose results are kept.")  # fmt: skip
@click.option("--dry-run", is_flag=True, help="Interpret tiny kernels on the CPU.")
def visit(minutes: float, output: Path, stages: str, earlier: Path | None, dry_run: bool) -> None:
    """Test, measure, tune and profile on this machine's GPU within MINUTES."""
    names = stages.split(",")
    unknown = [name for name in names if name not in STAGES]
    if unknown:
        raise ValueError(f"stage {unknown[0]!r} is unknown; there are {', '.join(STAGES)}")
    if dry_run:
        os.environ["TRITON_INTERPRET"] = "1"
    output.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix="visit-", ignore_cleanup_errors=True) as folder:
        at = Visit(_target(dry_run), "cpu" if dry_run else "cuda", minutes, output, Path(folder))
        (at.folder / "records").mkdir()
        for number in (signal.SIGTERM, signal.SIGINT):  # the running stage is ended, and what it found is written
            signal.signal(number, lambda *_: setattr(at, "stopped", True))
        if earlier is not None:
            resume(at, earlier)
        os.environ["RAMNET_RECORDS"] = str(at.folder / "records")
        click.echo(f"{at.target}: {len(names)} stages in {minutes:g} minutes")
        run(at, names, click.echo)
    from autotune.bench.report import GOAL_COLUMNS, goal_cells

    report = _report(at.found)
    for cells in (GOAL_COLUMNS, *map(goal_cells, report.goals)):
        click.echo(" | ".join(cells))
    click.echo(f"written: {output}")


if __name__ == "__main__":
    main(visit)
