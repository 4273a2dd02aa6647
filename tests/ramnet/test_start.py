"""What the command line and ``import ramnet`` import, and when."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from unittest.mock import patch

import click
import pytest

import lowering
import ramnet
import ramnet.training
from ramnet.cli import main
from ramnet.plugins import docstring, plugins

ROOT = Path(__file__).parents[2]
HEAVY = ("torch", "tvm", "triton", "optuna", "onnx", "onnxruntime", "matplotlib", "sklearn")
INHERITED = {name: value for name, value in os.environ.items() if name not in ("OMP_WAIT_POLICY", "GOMP_SPINCOUNT")}
NONE_HEAVY = f"import sys; found = set({HEAVY}) & set(sys.modules); assert not found, found"


def python(program: str, *arguments: str, cwd: Path = ROOT, **environment: str) -> subprocess.CompletedProcess[str]:
    """Runs a program in a process of its own."""
    return subprocess.run(
        [sys.executable, "-c", program, *arguments], cwd=cwd, env={**INHERITED, **environment},
        capture_output=True, text=True, check=False,
    )  # fmt: skip


@pytest.mark.parametrize("words", ["", *plugins("ramnet.commands"), "train mqar", "train text"], ids=str.split)
def test_help_imports_nothing_heavy(words: str) -> None:
    program = f"import atexit; from ramnet.cli import main\n@atexit.register\ndef _(): {NONE_HEAVY}\nmain()"
    done = python(program, *words.split(), "--help")
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout.startswith("Usage:")


def test_the_list_of_commands_shows_their_own_help() -> None:
    verbs = plugins("ramnet.commands")
    assert {"train", "tune", "export"} <= verbs.keys()
    for name, entry in verbs.items():
        loaded: click.Command = entry.load()
        assert click.Command(name, help=docstring(entry)).get_short_help_str(80) == loaded.get_short_help_str(80)


def test_importing_the_package_and_a_configuration_imports_no_torch() -> None:
    done = python(f"import ramnet; ramnet.RamNetConfig.preset('tiny'); {NONE_HEAVY}")
    assert (done.returncode, done.stderr) == (0, "")


def test_every_public_name_can_be_imported() -> None:
    """Each package is the first that its process imports, except torch, which is imported once before they fork."""
    programs = []
    for package in (ramnet, ramnet.training, lowering):
        names = package.__all__
        listed = f"import {package.__name__} as package; assert {{*{names}}} <= {{*dir(package)}}"
        programs.append(
            "; ".join([listed, *(f"package.{name}" for name in names), f"from {package.__name__} import *"])
        )
    forks = "for program in programs:\n    if not os.fork(): exec(program), print('done'), os._exit(0)\n    os.wait()"
    done = python(f"import os, sys, torch; sys.stdout.reconfigure(line_buffering=True); programs = {programs}\n{forks}")
    assert (done.stdout, done.stderr) == ("done\n" * len(programs), "")


def test_an_unknown_name_is_an_attribute_error() -> None:
    with pytest.raises(AttributeError, match="module 'ramnet' has no attribute 'attention'"):
        ramnet.attention  # noqa: B018
    assert not hasattr(ramnet, "attention")


@pytest.mark.parametrize(("policy", "spins"), [("", "10000"), ("active", "30000000000")])
def test_the_command_shortens_the_spins_of_torchs_threads_unless_the_user_sets_a_policy(
    policy: str, spins: str
) -> None:
    environment = {"OMP_DISPLAY_ENV": "verbose"} | ({"OMP_WAIT_POLICY": policy} if policy else {})
    done = python("from ramnet.cli import main; main()", "train", "mqar", "--steps", "0", **environment)
    assert "steps = 0" in done.stderr
    if "GOMP_SPINCOUNT" not in done.stderr:
        pytest.skip("torch's OpenMP is not GNU's")
    assert f"GOMP_SPINCOUNT = '{spins}'" in done.stderr


def test_importing_the_packages_does_not_change_the_environment() -> None:
    done = python("import os; before = {**os.environ}; import ramnet, lowering; assert {**os.environ} == before")
    assert done.stderr == ""


@pytest.mark.parametrize("error", [EOFError, OverflowError])
def test_an_error_that_click_takes_for_an_interruption_or_lets_through_is_a_sentence(
    error: type[Exception], capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    @click.command()
    def fails() -> None:
        raise error("the file ended")

    monkeypatch.setattr(sys, "argv", ["ramnet"])
    monkeypatch.setattr("ramnet.cli.signal.signal", lambda *_: None)  # that of the tests' process stays
    with patch.dict(os.environ), pytest.raises(SystemExit) as stop:
        main(fails)
    assert (stop.value.code, capsys.readouterr().err.strip()) == (1, "ramnet: the file ended")
