"""Fixtures for the tests of tuning."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from autotune.model.prediction import Predictor
from autotune.study.worker import Worker
from lowering.compilers import cxx

Command = Callable[..., tuple[int, str, str]]


@pytest.fixture
def ramnet(
    command_line: Callable[..., int], monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str], tmp_path: Path
) -> Command:
    """Run `ramnet tune` in this process and return its exit status, stdout and stderr."""
    monkeypatch.setenv("COLUMNS", "160")

    def run(*arguments: str | Path) -> tuple[int, str, str]:
        places = ("--output", tmp_path / "runs", "--records", tmp_path / "records.jsonl")
        return command_line("tune", *places, *arguments), *capfd.readouterr()

    return run


@pytest.fixture(scope="session")
def cpp() -> None:
    """Skip the test if there is no C++ compiler."""
    if cxx("g++", "clang++") is None:
        pytest.skip("there is neither g++ nor clang++")


@pytest.fixture(scope="session")
def compiler() -> Iterator[Worker]:
    """A worker that compiles for GPUs, shared by all tests because its process takes seconds to start."""
    with Worker(1, makes=Predictor) as worker:
        yield worker
