"""Fixtures for the tests of tuning."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

Command = Callable[..., tuple[int, str, str]]


@pytest.fixture
def ramnet(
    command_line: Callable[..., int], monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str], tmp_path: Path
) -> Command:
    """Runs `ramnet tune` in this process; gives its exit status, stdout and stderr."""
    monkeypatch.setenv("COLUMNS", "160")

    def run(*arguments: str | Path) -> tuple[int, str, str]:
        places = ("--output", tmp_path / "runs", "--records", tmp_path / "records.jsonl")
        return command_line("tune", *places, *arguments), *capfd.readouterr()

    return run
