"""Entry points of the packages, installed or in a checkout."""

from __future__ import annotations

import os
import subprocess
import sys
from importlib.metadata import EntryPoint, entry_points
from pathlib import Path

import pytest

from ramnet import plugins

ROOT = Path(__file__).parents[2]
GROUPS = ["ramnet.commands", "ramnet.backends", "ramnet.step_times", "ramnet.functions"]


@pytest.mark.parametrize("group", GROUPS)
def test_a_checkout_that_is_not_installed_has_the_same_plugins(group: str, monkeypatch: pytest.MonkeyPatch) -> None:
    installed = {entry.name: entry.value for entry in entry_points(group=group)}
    monkeypatch.setattr(plugins, "entry_points", lambda group: ())
    found = plugins.plugins(group)
    # An installation may be older than the checkout.
    assert found and installed.items() <= {name: entry.value for name, entry in found.items()}.items()
    assert all(callable(entry.load()) for entry in found.values())


def test_an_installation_may_be_older_than_the_checkout(monkeypatch: pytest.MonkeyPatch) -> None:
    old = [EntryPoint("cpu", "lowering.gone:backend", "ramnet.backends"), EntryPoint("npu", "other:backend", "")]
    monkeypatch.setattr(plugins, "entry_points", lambda group: old)
    found = {name: entry.value for name, entry in plugins.plugins("ramnet.backends").items()}
    assert found["cpu"] == "lowering.cpu.backend:backend" and found["npu"] == "other:backend" and "gpu" in found


def test_an_unknown_group_is_empty() -> None:
    assert plugins.plugins("ramnet.nothing") == {}


def test_the_command_runs_as_a_module_of_the_checkout(tmp_path: Path) -> None:
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    command = [sys.executable, "-m", "ramnet.cli", "bench", "--target", "toaster"]
    done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 1
    assert done.stderr.startswith("ramnet: target 'toaster' is unknown; there are a10, a100")
    assert len(done.stderr.splitlines()) == 1


@pytest.mark.parametrize(
    "text", ['[project]\nname = "other"\n[project.entry-points."ramnet.backends"]\nx = "y:z"', "[", ""]
)
def test_the_file_of_another_project_declares_nothing(
    text: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    (tmp_path / "pyproject.toml").write_text(text)
    monkeypatch.setattr(plugins, "_PROJECT", tmp_path / "pyproject.toml")
    monkeypatch.setattr(plugins, "entry_points", lambda group: ())
    assert plugins.plugins("ramnet.backends") == {}
