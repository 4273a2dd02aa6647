"""The README's commands and examples work."""

from __future__ import annotations

import re
import subprocess
from pathlib import Path

import pytest
import torch
from click.testing import CliRunner

from ramnet.cli import ramnet

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text(encoding="utf-8")


def test_python_example_runs(monkeypatch: pytest.MonkeyPatch) -> None:
    """Without generated code, whose compilation takes half a minute; test_use_and_compile.py tests it."""
    pytest.importorskip("tvm", reason="the example runs on the CPU kernels")
    trace = torch.compile
    monkeypatch.setattr(torch, "compile", lambda function, **how: trace(function, **{**how, "backend": "eager"}))
    (example,) = re.findall(r"```python\n(.*?)```", README, flags=re.DOTALL)
    names: dict = {}
    exec(example, names)
    assert names["written"].shape == (1, 120)
    assert int(names["more"].state.position) == 200


@pytest.mark.parametrize("target", sorted(set(re.findall(r"make ([a-z]+)\b", README))))
def test_make_targets_exist(target: str) -> None:
    done = subprocess.run(["make", "--dry-run", target], cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize("verb", ["tune", "bench", "export", "train", "generate", "eval", "targets"])
def test_every_verb_explains_its_options(verb: str) -> None:
    for words in ([verb], [verb, "mqar"], [verb, "text"]) if verb == "train" else ([verb],):
        result = CliRunner().invoke(ramnet, [*words, "--help"])
        assert result.exit_code == 0, result.output
        # An option without help would end its line with its type, or with nothing.
        bare = re.findall(r"^  (--[a-z-]+(?: [A-Z]+)?)$", result.output, flags=re.MULTILINE)
        for option in bare:
            following = result.output.split(option, 1)[1].splitlines()[1]
            assert following.startswith("     "), f"{' '.join(words)} {option} has no help"


@pytest.mark.parametrize(
    ("given", "called"),
    [
        ((), "tune --target cpu"),
        (("CHECKPOINT=runs/text",), 'tune-model "runs/text" --format c'),
        (("TARGET=a100", "CHECKPOINT=runs/my text"), 'tune --target a100 --checkpoint "runs/my text"'),
    ],
)
def test_make_tune_takes_a_target_and_a_checkpoint(given: tuple[str, ...], called: str) -> None:
    done = subprocess.run(["make", "--dry-run", "tune", *given], cwd=ROOT, capture_output=True, text=True, check=True)
    assert called in done.stdout
