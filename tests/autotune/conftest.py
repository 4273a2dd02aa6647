"""Fixtures for the tests of tuning."""

from __future__ import annotations

import signal
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from ramnet.cli import main

Command = Callable[..., tuple[int, str, str]]


@pytest.fixture
def ramnet(monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str], tmp_path: Path) -> Iterator[Command]:
    """Runs `ramnet tune` in this process; gives its exit status, stdout and stderr."""
    handlers = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    monkeypatch.setenv("COLUMNS", "160")

    def run(*arguments: str | Path) -> tuple[int, str, str]:
        places = ("--output", tmp_path / "runs", "--records", tmp_path / "records.jsonl")
        monkeypatch.setattr(sys, "argv", ["ramnet", "tune", *map(str, (*places, *arguments))])
        status = 0
        try:
            main()
        except SystemExit as stop:
            status = int(stop.code or 0)
        return status, *capfd.readouterr()

    yield run
    for number, handler in handlers.items():
        signal.signal(number, handler)
