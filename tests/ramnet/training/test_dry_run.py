"""``ramnet train … --dry-run`` as a user types it."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from lowering.recorded_times import MemoryOps
from ramnet.training.footprint import Pass

Said = Callable[..., dict[str, str]]


@pytest.fixture
def said(
    command_line: Callable[..., int], capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
) -> Said:  # fmt: skip
    """Run a dry run in an empty folder, where it leaves nothing, and return its lines by their names."""
    monkeypatch.chdir(tmp_path)

    def run(*arguments: object) -> dict[str, str]:
        before = set(tmp_path.rglob("*"))
        assert command_line("train", *arguments, "--dry-run") == 0
        assert set(tmp_path.rglob("*")) == before
        lines: dict[str, list[str]] = {}
        name = ""
        for line in capsys.readouterr().out.splitlines():
            name = line[:20].strip() or name
            lines.setdefault(name, []).append(line[20:].strip())
        return {name: " ".join(texts) for name, texts in lines.items()}

    return run


SMALL = ("--length", 8, "--batch-size", 4, "--kernels", "reference")


def test_it_says_what_a_run_needs(said: Said, tmp_path: Path) -> None:
    (tmp_path / "page.txt").write_text("page")
    lines = said("text", "--data", "page.txt", "--steps", 10, "--carry", "--micro-batch", 2, *SMALL)
    assert lines["parameters"] == "396,048"
    memory = lines["memory of a process"]
    assert "gradients 1.58 MB moments of AdamW 3.17 MB state that rows go on from 1.09 MB" in memory
    assert "activations of 2 rows of 8 tokens" in memory
    assert lines["a step"].startswith("32 tokens, 6.92e+07 FLOPs")
    assert lines["time of a step"] == "not known: only the tuned kernels of RAM-Net have records"
    assert lines["the run"] == "10 steps, 320 tokens, 6.92e+08 FLOPs"
    assert lines["a checkpoint"] == "7.43 MB: the model 1.58 MB, training 5.85 MB"


def test_processes_of_torchrun_share_rows_and_with_fsdp_parameters(said: Said, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WORLD_SIZE", "2")
    lines = said("mqar", "--parallel", "fsdp", "--steps", 1, "--kernels", "reference")
    assert lines["memory of a process"].startswith("parameters 1.10 MB, its share of 2 processes gradients 1.10 MB")
    assert "activations of 32 rows of 64 tokens" in lines["memory of a process"]
    monkeypatch.setattr("ramnet.training.dry_run.one_pass", lambda *_: Pass(1, 2))
    memory = said("mqar", "--steps", 1, "--kernels", "reference")["memory of a process"]
    assert "gradients in exchange 2.21 MB" in memory and memory.endswith("in all 11.0 MB at a time")
    monkeypatch.setenv("RANK", "1")
    assert said("mqar", "--steps", 1, "--kernels", "reference") == {}


def test_the_time_of_a_step_is_that_of_products_and_recorded_ops(said: Said, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[tuple[int, int]] = []

    def memory_ops(_: object, rows: int, length: int) -> MemoryOps:
        asked.append((rows, length))
        return MemoryOps(1.0, 3.0, "abacus", "measured")

    monkeypatch.setattr("lowering.recorded_times.memory_ops", memory_ops)
    monkeypatch.setattr("ramnet.training.dry_run.peak_flops", lambda *_: 1e12)
    monkeypatch.setattr("ramnet.training.dry_run.one_pass", lambda *_: Pass(1, 2 * 10**12))
    monkeypatch.setattr("ramnet.training.cli._kernels", lambda *_: "cpu")
    (lines, again) = (said("mqar", "--steps", 3600, *more) for more in ((), ("--recompute",)))
    assert asked == [(64, 64)] * 2
    assert lines["time of a step"] == (
        "at least 6.00 s: matrix products 2.00 s at the 1000 GFLOP/s of a large one here, and memory ops 4.00 s by the"
        " records of abacus (measured)"
    )
    assert lines["the run"].endswith("FLOPs, at least 6 hours")
    assert "memory ops 5.00 s" in again["time of a step"]


@pytest.mark.parametrize(
    ("arguments", "line"),
    [
        (("text", "--data", "missing.txt"), "missing.txt cannot be read: No such file or directory\n"),
        (("text", "--length", "0"), "length is 0; it must be in 1..2^31"),
        (("mqar", "--pairs", "17"), "length is 64; 17 pairs"),
        (("text", "--resume", "--output", "nothing"), "nothing holds no training to resume"),
    ],
)
def test_bad_input_is_found(
    command_line: Callable[..., int], capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path, arguments: tuple[str, ...], line: str,
) -> None:  # fmt: skip
    monkeypatch.chdir(tmp_path)
    assert command_line("train", *arguments, "--dry-run") == 1
    assert line in capsys.readouterr().err
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(("rank", "count"), [("0", "0"), ("2", "2"), ("0", "-2"), ("0", "two")])
def test_processes_that_cannot_be_are_named(
    rank: str, count: str, command_line: Callable[..., int], monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    monkeypatch.setenv("RANK", rank)
    monkeypatch.setenv("WORLD_SIZE", count)
    assert command_line("train", "mqar", "--dry-run") == 1
    said = f"ramnet: RANK is {rank!r} and WORLD_SIZE is {count!r}; RANK must be in 0..WORLD_SIZE - 1\n"
    assert capsys.readouterr().err == said
