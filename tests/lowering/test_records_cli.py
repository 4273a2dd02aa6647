"""``ramnet records``: show, export, import and prune."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from lowering.fingerprint import fingerprint, versions
from ramnet.cli import ramnet as command
from schedules import records
from schedules.cpu import MemoryStep
from schedules.gpu import SharedScan
from schedules.records import Record, Time
from schedules.workload import Workload

Run = Callable[..., tuple[int, str]]
STEP = MemoryStep(tile=8, unroll=4, parallel=False, prefetch=0)


def workload(slots: int) -> Workload:
    return Workload(op="memory_step", shape={"N": 16, "K": 8, "M": slots, "D": 64})


def record(slots: int, schedule: Any = STEP, **changes: Any) -> Record:
    """Return a record of the current code, with ``changes``."""
    time = Time(median=2.5e-6, spread=1e-7, runs=9)
    return Record(
        workload=workload(slots), target="cpu", device="here", knobs=schedule.model_dump(), how="measured", gain=1.5,
        gain_spread=0.1, tuned=time, default=time, eager=time, trials=3, date="2026-01-01", versions=versions("cpu"),
        fingerprint=fingerprint("memory_step", "cpu", schedule),
    ).model_copy(update=changes)  # fmt: skip


@pytest.fixture(autouse=True)
def folders(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The user's and the shipped records, empty at first."""
    monkeypatch.setenv("RAMNET_RECORDS", str(tmp_path / "mine"))
    monkeypatch.setattr(records, "SHIPPED", tmp_path / "shipped")


@pytest.fixture
def run(command_line: Callable[..., int], capfd: pytest.CaptureFixture[str]) -> Run:
    def call(*arguments: object) -> tuple[int, str]:
        status = command_line("records", *arguments)
        return status, "".join(capfd.readouterr())

    return call


def mine() -> list[Record]:
    return records.load(records.records_path("cpu"))


def test_each_verb_has_its_help(run: Run) -> None:
    group = command.get_command(None, "records")  # type: ignore[arg-type]
    assert {*group.commands} == {"show", "export", "import", "prune"}  # type: ignore[union-attr]
    for verb in ("show", "export", "import", "prune"):
        status, out = run(verb, "--help")
        assert status == 0 and out.startswith("Usage:") and "--" in out


def test_show_prints_times_of_current_kernels_only_and_the_source_of_a_record(run: Run) -> None:
    records.merge(records.shipped_path("cpu"), [record(64, fingerprint="of other code", date="2026-01-02")])
    records.merge(records.records_path("cpu"), [record(256), record(512, MemoryStep.default(workload(512)))])
    status, out = run("show")
    lines = [line for line in out.splitlines() if "2026" in line]
    assert status == 0 and len(lines) == 3
    of = {size: next(line for line in lines if whose in line) for size, whose in ((64, "shipped"), (256, "1.50×"))}
    assert "stale: other code" in of[64] and "2.50 µs" not in of[64] and "×" not in of[64]
    assert "measured" in of[256] and "2.50 µs" in of[256] and "yours" in of[256]
    assert sum("no gain" in line for line in lines) == 1
    assert "tile=8 unroll=4" in out


def test_show_prints_only_the_knobs_that_a_kernel_uses(run: Run) -> None:
    scan = SharedScan(channels=2)
    shape = {"N": 16, "T": 64, "K": 8, "M": 64, "D": 64}
    of = Workload(op="memory_scan", shape=shape, dtype="bfloat16")
    changes = {"workload": of, "target": "a100", "device": "a100"}
    records.merge(records.records_path("a100"), [record(64, **changes, knobs=scan.model_dump())])
    _, out = run("show", "--target", "a100")
    assert "channels=2" in out and "tile=" not in out, "form shared has no knob tile"


def test_show_and_export_select_records(run: Run, tmp_path: Path) -> None:
    records.merge(records.records_path("cpu"), [record(64), record(64, device="there")])
    assert run("show", "--device", "there")[1].count("2026") == 1
    assert run("show", "--op", "memory_scan") == (0, "no records\n")
    assert run("show", "--target", "a100") == (0, "no records\n")
    assert "target 'abacus' is unknown" in run("show", "--target", "abacus")[1]
    assert run("export", tmp_path / "one.jsonl", "--device", "there") == (0, f"1 record in {tmp_path / 'one.jsonl'}\n")
    assert [row.device for row in records.load(tmp_path / "one.jsonl")] == ["there"]


def test_exported_records_can_be_imported(run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = tmp_path / "passed on.jsonl"
    found = [record(64), record(256)]
    records.merge(records.records_path("cpu"), found)
    records.merge(records.shipped_path("cpu"), [record(512)])
    run("export", file)
    assert records.load(file) == sorted(found, key=lambda row: row.key)
    run("export", file, "--shipped")
    assert len(records.load(file)) == 3
    monkeypatch.setenv("RAMNET_RECORDS", str(tmp_path / "another"))
    status, out = run("import", file)
    assert status == 0 and out == f"cpu: 3 of 3 records in {records.records_path('cpu')}\n"
    assert mine() == records.load(file)


def test_an_import_replaces_known_records_only_with_replace(run: Run, tmp_path: Path) -> None:
    other = record(64, MemoryStep(tile=16, unroll=2, parallel=False, prefetch=0))
    records.save(tmp_path / "theirs.jsonl", [other, record(256)])
    records.merge(records.records_path("cpu"), [record(64)])
    status, out = run("import", tmp_path / "theirs.jsonl")
    assert status == 0 and "cpu: 1 of 2 records" in out and "1 record left out: known already, see --replace" in out
    assert {row.workload.shape["M"]: row.schedule() for row in mine()} == {64: STEP, 256: STEP}
    assert run("import", tmp_path / "theirs.jsonl", "--replace")[0] == 0
    assert {row.workload.shape["M"]: row.schedule() for row in mine()} == {64: other.schedule(), 256: STEP}


def test_a_file_that_holds_no_records_is_refused_before_anything_is_written(run: Run, tmp_path: Path) -> None:
    (tmp_path / "letter").write_text("a letter\n")
    records.save(tmp_path / "good.jsonl", [record(64)])
    of = Workload(op="memory_scan", shape={"N": 1, "T": 1, "K": 1, "M": 1, "D": 1})
    strange = record(64, workload=of, target="abacus", knobs=SharedScan().model_dump())
    records.save(tmp_path / "strange.jsonl", [strange])
    for name, why in (("letter", "letter, line 1, is not a record"), ("strange.jsonl", "target 'abacus' is unknown")):
        status, out = run("import", tmp_path / "good.jsonl", tmp_path / name)
        assert status == 1 and why in out
    assert not (tmp_path / "mine").exists()


def test_prune_removes_stale_records_except_shipped_ones(run: Run) -> None:
    stale, good = record(64, fingerprint="of other code"), record(256)
    records.merge(records.records_path("cpu"), [stale, good])
    records.merge(records.shipped_path("cpu"), [stale])
    status, out = run("prune", "--stale")
    assert status == 0 and out.endswith("1 removed\n") and "stale: other code" in out
    assert mine() == [good] and records.load(records.shipped_path("cpu")) == [stale]
    assert run("prune", "--stale", "--op", "memory_step") == (0, "0 removed\n")
    assert run("prune", "--device", "there") == (0, "0 removed\n")
    assert run("prune", "--device", "here", "--target", "cpu")[0] == 0
    assert mine() == []


def test_prune_needs_a_selection(run: Run) -> None:
    records.merge(records.records_path("cpu"), [record(64)])
    status, out = run("prune")
    assert status == 2 and "say which records to remove" in out
    assert len(mine()) == 1
