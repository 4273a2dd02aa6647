"""``ramnet export`` and ``ramnet generate`` as a user types them."""

from __future__ import annotations

import io
import os
import shutil
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import click
import pytest
import torch
from click.testing import CliRunner

from export.generate_cli import generate
from export.onnx.build import FILES
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
        assert self.out == ""
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
    assert result.out.splitlines()[-1].startswith(f"wrote {tmp_path}/onnx: LICENSE, README.md, decode.onnx")
    assert sorted(path.name for path in (tmp_path / "onnx").iterdir()) == sorted(FILES)


def test_generate_is_the_same_through_onnx_and_pytorch(mixed: Exported, ramnet: Callable[..., Ran]) -> None:
    options = ("grüße", "--max-new-tokens", "30", "--temperature", "0.7", "--top-k", "40", "--top-p", "0.9")
    onnx = ramnet("generate", "--onnx", mixed.onnx, *options, "--seed", "3")
    checkpoint = ramnet("generate", "--checkpoint", mixed.checkpoint, *options, "--seed", "3")
    assert (onnx.code, checkpoint.code) == (0, 0), onnx.err + checkpoint.err
    assert onnx.out.startswith("grüße")
    assert len(onnx.out) > len("grüße\n")
    assert onnx.out == checkpoint.out


def test_generate_stops_at_a_string(mixed: Exported, ramnet: Callable[..., Ran]) -> None:
    options = ("--onnx", mixed.onnx, "text", "--seed", "3", "--max-new-tokens", "40")
    options = (*options, "--temperature", "1.5", "--min-p", "0.01", "--repetition-penalty", "1.1")
    free = ramnet("generate", *options).out
    stop = next(letter for letter in free[5:] if letter.isascii() and letter.isprintable())
    assert ramnet("generate", *options, "--stop", stop).out == free[: free.index(stop, 4) + 1] + "\n"


@pytest.mark.parametrize("typed", [b"a\xff\xfeb", b"\xc3", b"gr\xfc\xdfe", "grüße".encode(), b" "])
def test_a_prompt_is_the_bytes_of_the_command_line(mixed: Exported, ramnet: Callable[..., Ran], typed: bytes) -> None:
    expected = mixed.model.generate(torch.tensor([list(typed)]), 5)
    said = bytes(expected[0].tolist()).decode(errors="replace") + "\n"
    options = ("--max-new-tokens", "5", "--temperature", "0")
    for source in (("--onnx", mixed.onnx), ("--checkpoint", mixed.checkpoint)):
        result = ramnet("generate", *source, os.fsdecode(typed), *options)
        assert (result.code, result.out, result.err) == (0, said, "")


def test_text_is_printed_as_utf8_whatever_the_locale(mixed: Exported, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "stdout", io.TextIOWrapper(io.BytesIO(), encoding="latin-1"))
    generate.main(["--onnx", str(mixed.onnx), "grüße", "--max-new-tokens", "0"], standalone_mode=False)
    assert sys.stdout.buffer.getvalue() == "grüße\n".encode()


def test_any_number_of_tokens_may_be_asked_for(
    mixed: Exported, ramnet: Callable[..., Ran], monkeypatch: pytest.MonkeyPatch
) -> None:
    said = []

    def until_interrupted(text: bytes) -> None:
        said.append(text)
        if len(said) > 20:
            raise KeyboardInterrupt

    monkeypatch.setattr("export.generate_cli._printer", lambda: until_interrupted)
    result = ramnet("generate", "--onnx", mixed.onnx, "text", "--max-new-tokens", 10**30)
    assert (result.code, result.err.strip()) == (130, "ramnet: interrupted")


def test_bad_arguments_are_one_line(
    mixed: Exported, export_named: Callable[[str], Exported], tmp_path: Path, ramnet: Callable[..., Ran]
) -> None:
    assert "is not a checkpoint" in ramnet("export", tmp_path, "--output", tmp_path / "onnx").error
    (tmp_path / "file").touch()
    assert "Not a directory" in ramnet("export", mixed.checkpoint, "--output", tmp_path / "file" / "onnx").error
    assert "is not an export" in ramnet("generate", "--onnx", mixed.checkpoint, "text").error
    no_bytes = ramnet("generate", "--onnx", export_named("extremes").onnx, "text").error
    assert "has 37 tokens; text needs a byte-level model, of 256" in no_bytes
    damaged = tmp_path / "damaged"
    shutil.copytree(mixed.onnx, damaged)
    (damaged / "decode.onnx").write_bytes(b"")
    assert f"{damaged}/decode.onnx is damaged" in ramnet("generate", "--onnx", damaged, "text").error
    name = os.fsdecode(b"not \xff UTF-8")
    shutil.copytree(mixed.onnx, tmp_path / name)
    assert "has a name that is not UTF-8" in ramnet("generate", "--onnx", tmp_path / name, "text").error
    assert "is unknown" in ramnet("generate", "--checkpoint", mixed.checkpoint, "--kernels", "x", "text").error
    assert sorted(path.name for path in tmp_path.iterdir()) == ["damaged", "file", name]


@pytest.mark.parametrize(
    ("option", "value", "problem"),
    [
        ("--temperature", "-1", "temperature is -1.0"),
        ("--temperature", "nan", "temperature is nan"),
        ("--temperature", "inf", "temperature is inf"),
        ("--top-k", "-1", "top_k is -1"),
        ("--top-p", "nan", "top_p is nan"),
        ("--top-p", "0", "top_p is 0.0"),
        ("--top-p", "1.5", "top_p is 1.5"),
        ("--min-p", "2", "min_p is 2.0"),
        ("--repetition-penalty", "0", "repetition_penalty is 0.0"),
    ],
)
def test_invalid_options_are_reported_before_a_model_is_read(
    tmp_path: Path, ramnet: Callable[..., Ran], option: str, value: str, problem: str
) -> None:
    assert problem in ramnet("generate", "--onnx", tmp_path / "absent", "text", option, value).error


@pytest.mark.parametrize("file", ["config.json", "model.safetensors"])
@pytest.mark.parametrize("damage", ["cut", "empty", "no text", "a folder", "the other file", "missing"])
def test_a_damaged_checkpoint_is_one_line_and_nothing_is_written(
    mixed: Exported, tmp_path: Path, ramnet: Callable[..., Ran], file: str, damage: str
) -> None:
    checkpoint = tmp_path / "checkpoint"
    checkpoint.mkdir()
    both = {name: (mixed.checkpoint / name).read_bytes() for name in ("config.json", "model.safetensors")}
    content = both.pop(file)
    ((other, other_content),) = both.items()
    (checkpoint / other).write_bytes(other_content)
    contents = {
        "cut": content[: len(content) // 2],
        "empty": b"",
        "no text": b"\xff" * len(content),
        "the other file": other_content,
    }
    if damage == "a folder":
        (checkpoint / file).mkdir()
    elif damage != "missing":
        (checkpoint / file).write_bytes(contents[damage])
    for command in (
        ("export", checkpoint, "--output", tmp_path / "onnx"),
        ("generate", "--checkpoint", checkpoint, "a"),
    ):
        assert str(checkpoint) in ramnet(*command).error
    assert [path.name for path in tmp_path.iterdir()] == ["checkpoint"]


@pytest.mark.parametrize(
    ("arguments", "problem"),
    [
        (("text",), "either --onnx DIR or --checkpoint DIR"),
        (("--onnx", "a", "--checkpoint", "b", "text"), "either --onnx DIR or --checkpoint DIR"),
        (("--onnx", "a", "--kernels", "cpu", "text"), "--kernels needs --checkpoint"),
        (("--onnx", "a", ""), "TEXT is empty"),
        (("--onnx", "a", "text", "--max-new-tokens", "-1"), "-1 is not in the range"),
        (("--onnx", "a", "text", "--max-new-tokens", "many"), "'many' is not a valid integer"),
        (("--onnx", "a", "text", "--temperature", "warm"), "'warm' is not a valid float"),
        (("--onnx", "a", "text", "--seed", str(2**64)), "is not in the range"),
    ],
)
def test_generate_refuses_options_that_exclude_each_other(arguments: tuple[str, ...], problem: str) -> None:
    result = CliRunner().invoke(generate, arguments)
    assert result.exit_code == click.UsageError.exit_code
    assert problem in result.output
