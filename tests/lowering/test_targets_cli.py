"""``ramnet targets``: what this machine can do for each target."""

from __future__ import annotations

from pathlib import Path

import pytest
from click.testing import CliRunner

from lowering import targets as table
from lowering.cli import targets
from lowering.fingerprint import fingerprint, versions
from schedules import records
from schedules.gpu import MemoryStep
from schedules.records import Record, Time
from schedules.workload import Workload


def step(slots: int) -> Workload:
    return Workload(op="memory_step", shape={"N": 16, "K": 8, "M": slots, "D": 64}, dtype="bfloat16")


def row(name: str) -> list[str]:
    """The cells of a target's first line."""
    result = CliRunner().invoke(targets)
    assert result.exit_code == 0, result.output
    (found,) = [line for line in result.output.splitlines() if line.startswith(f"│ {name} ")]
    return [cell.strip() for cell in found.strip("│").split("│")]


@pytest.fixture(autouse=True)
def nothing_here(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(table, "here", lambda: None)
    monkeypatch.setenv("RAMNET_RECORDS", str(tmp_path))
    monkeypatch.setattr(records, "SHIPPED", tmp_path / "none")
    monkeypatch.setattr("lowering.nvcc.nvcc", lambda: "nvcc")  # cells have the same width on every machine


@pytest.fixture
def compilers(monkeypatch: pytest.MonkeyPatch) -> set[str]:
    """The installed packages, to which the test adds."""
    found: set[str] = set()
    monkeypatch.setattr("importlib.util.find_spec", lambda name: name if name in found else None)
    return found


def test_every_target_has_a_row() -> None:
    for name in table.TARGETS:
        assert row(name)[0] == name


def test_a_gpu_that_is_not_here_is_compiled_for_and_modelled(compilers: set[str]) -> None:
    compilers.add("triton")
    assert row("mi300x")[2:] == ["no: not here", "Triton", "yes", "none"]


def test_a_gpu_that_is_here_runs(compilers: set[str], monkeypatch: pytest.MonkeyPatch) -> None:
    compilers.add("triton")
    monkeypatch.setattr(table, "here", lambda: table.find("h200"))
    assert row("h200")[2] == "yes"
    assert row("h100")[2] == "no: not here"


def test_without_triton_it_says_what_to_install(compilers: set[str]) -> None:
    assert row("a100")[3].startswith("no: pip install")
    assert row("a100")[4].startswith("no: pip install")
    assert "'ramnet[gpu]'" in CliRunner().invoke(targets).output


def test_without_tvm_the_cpu_says_what_to_install(compilers: set[str]) -> None:
    assert row("cpu")[2].startswith("no: pip install")
    assert "'ramnet[tvm]'" in CliRunner().invoke(targets).output


def test_records_are_counted_by_how_they_came_and_stale_ones_apart(monkeypatch: pytest.MonkeyPatch) -> None:
    time = Time(median=1e-6, spread=0.0, runs=0)
    today = {
        "versions": versions("a100", MemoryStep()),
        "fingerprint": fingerprint("memory_step", "a100", MemoryStep()),
    }
    found = [
        Record(
            workload=step(slots), target="a100", device="a100", knobs=MemoryStep().model_dump(), how=how, gain=1.0,
            gain_spread=0.0, tuned=time, default=time, trials=1, date="2026-01-01", **today | changes,
        )
        for slots, how, changes in (
            (64, "measured", {}), (128, "measured", {}),
            (256, "measured", {"fingerprint": "of other code"}),
            (512, "modelled, not run", {"fingerprint": "of other code"}),
        )
    ]  # fmt: skip
    records.merge(records.records_path("a100"), found)
    assert row("a100")[5] == "2 measured, 2 stale"
