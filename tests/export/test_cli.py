"""``ramnet export`` and ``ramnet generate`` as a user types them."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import pytest

from export.build import FILES
from tests.export.conftest import Exported


@dataclass(frozen=True)
class Ran:
    code: int
    out: str
    err: str

    @property
    def error(self) -> str:
        """The only line that a command that failed prints."""
        assert self.code != 0
        (line,) = self.err.splitlines()
        return line


@pytest.fixture
def ramnet(command_line: Callable[..., int], capfd: pytest.CaptureFixture[str]) -> Callable[..., Ran]:
    """Runs the command's own entry point in this process."""
    return lambda *arguments: Ran(command_line(*arguments), *capfd.readouterr())


def test_export_verifies_and_writes(
    mixed: Exported, tmp_path: Path, quick_build: None, ramnet: Callable[..., Ran]
) -> None:
    result = ramnet("export", mixed.checkpoint, "--output", tmp_path / "onnx")
    assert result.code == 0, result.err
    assert "64 decode steps" in result.out
    assert "FAILED" not in result.out
    assert result.out.splitlines()[-1].startswith(f"wrote {tmp_path}/onnx: decode.onnx")
    assert sorted(path.name for path in (tmp_path / "onnx").iterdir()) == sorted(FILES)


def test_generate_is_the_same_through_onnx_and_pytorch(mixed: Exported, ramnet: Callable[..., Ran]) -> None:
    options = ("grüße", "--max-new-tokens", "30", "--temperature", "0.7", "--top-k", "40", "--top-p", "0.9")
    onnx = ramnet("generate", "--onnx", mixed.onnx, *options, "--seed", "3")
    checkpoint = ramnet("generate", "--checkpoint", mixed.checkpoint, *options, "--seed", "3")
    assert (onnx.code, checkpoint.code) == (0, 0), onnx.err + checkpoint.err
    assert onnx.out.startswith("grüße")
    assert len(onnx.out) > len("grüße\n")
    assert onnx.out == checkpoint.out


def test_bad_arguments_are_one_line(
    mixed: Exported, export_named: Callable[[str], Exported], tmp_path: Path, ramnet: Callable[..., Ran]
) -> None:
    assert "is not a checkpoint" in ramnet("export", tmp_path, "--output", tmp_path / "onnx").error
    (tmp_path / "file").touch()
    assert "Not a directory" in ramnet("export", mixed.checkpoint, "--output", tmp_path / "file" / "onnx").error
    assert "is not an export" in ramnet("generate", "--onnx", mixed.checkpoint, "text").error
    no_bytes = ramnet("generate", "--onnx", export_named("bare").onnx, "text").error
    assert "has 37 tokens; text needs a byte-level model, of 256" in no_bytes
    damaged = tmp_path / "damaged"
    shutil.copytree(mixed.onnx, damaged)
    (damaged / "decode.onnx").write_bytes(b"")
    assert f"{damaged}/decode.onnx is damaged" in ramnet("generate", "--onnx", damaged, "text").error
    assert "temperature is -1.0" in ramnet("generate", "--onnx", mixed.onnx, "text", "--temperature", "-1").error
    assert sorted(path.name for path in tmp_path.iterdir()) == ["damaged", "file"]


@pytest.mark.parametrize(
    ("arguments", "problem"),
    [
        (("text",), "either --onnx DIR or --checkpoint DIR"),
        (("--onnx", "a", "--checkpoint", "b", "text"), "either --onnx DIR or --checkpoint DIR"),
        (("--onnx", "a", "--kernels", "cpu", "text"), "--kernels goes with --checkpoint"),
        (("--onnx", "a", ""), "TEXT is empty"),
    ],
)
def test_generate_says_what_goes_together(arguments: tuple[str, ...], problem: str) -> None:
    import click
    from click.testing import CliRunner

    from export.cli import generate

    result = CliRunner().invoke(generate, arguments)
    assert result.exit_code == click.UsageError.exit_code
    assert problem in result.output
