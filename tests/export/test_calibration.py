"""Int4 is calibrated on the text that a model was trained on, or on a given one."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import torch
from click.testing import CliRunner
from safetensors.torch import load_file

pytest.importorskip("tvm", reason="the library needs tvm: pip install 'ramnet[tvm]'")

from export import quality
from export.c.build import write_weights
from export.c.session import WEIGHTS
from export.cli import export
from lowering.aot import calibration, weights
from ramnet import RamNetForCausalLM
from ramnet.training.cli import train
from tests.lowering.aot.c_library import TINY, model_of


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model trained on the first nine tenths of a text: a, b, …; the rest is capitals."""
    folder = tmp_path_factory.mktemp("checkpoint")
    (folder / "text").write_bytes(bytes(range(97, 123)) * 45 + b"ABCDEFGHIJKLM" * 10)
    options = ["--steps", "1", "--batch-size", "1", "--length", "32", "--kernels", "reference"]
    command = ["text", "--data", str(folder / "text"), "--output", str(folder / "run"), *options]
    assert CliRunner().invoke(train, command, catch_exceptions=False).exit_code == 0
    return folder / "run"


def test_the_text_that_training_held_out_is_not_calibrated_on(checkpoint: Path) -> None:
    windows = quality.calibration(checkpoint)
    assert len(windows) == 64 and max(map(len, windows)) == 32
    assert all((ids >= 97).all() for ids in windows), "neither capitals nor padding"
    assert (quality.held_out(checkpoint).ids < 91).all()


def test_a_given_text_is_read_as_bytes(checkpoint: Path, tmp_path: Path) -> None:
    (tmp_path / "text").write_bytes(b"\x00\xff" * 10)
    windows = quality.calibration(checkpoint, tmp_path / "text")
    assert {*torch.cat(windows).tolist()} == {0, 255}
    with pytest.raises(ValueError, match="missing cannot be read: No such file"):
        quality.calibration(checkpoint, tmp_path / "missing")
    (tmp_path / "text").write_bytes(b"a")
    with pytest.raises(ValueError, match="text has no text to calibrate on"):
        quality.calibration(checkpoint, tmp_path / "text")


def test_weights_are_calibrated_in_int4_only(tmp_path: Path) -> None:
    model, ids = model_of(TINY), [torch.arange(32), torch.arange(20)]
    parameters = {name: value.detach() for name, value in model.named_parameters()}
    moments = calibration.moments(model, ids)
    for precision in ("int8", "int4"):
        write_weights(model, precision, tmp_path, ids)
        found = load_file(tmp_path / WEIGHTS)
        nearest = weights.stored(parameters, TINY, precision)
        want = weights.stored(parameters, TINY, precision, moments)
        assert all(torch.equal(found[name], want[name]) for name in want)
        assert torch.equal(found["head.weight"], nearest["head.weight"]) == (precision == "int8")


@pytest.mark.parametrize("kind", ["c", "wasm"])
def test_the_command_calibrates_on_the_training_text_or_the_given_one(
    checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kind: str
) -> None:
    taken: list[list[torch.Tensor] | None] = []
    for made in ("export.c.build.export_c", "export.web.export_web"):
        monkeypatch.setattr(made, lambda *_, calibration, **others: taken.append(calibration) or 1 / 0)

    def run(*options: str) -> str:
        command = [str(checkpoint), "--output", str(tmp_path / "out"), "--format", kind, *options]
        return CliRunner().invoke(export, command).output

    (tmp_path / "text").write_bytes(b"ab" * 10)
    run("--precision", "int4")
    run("--precision", "int4", "--calibrate", str(tmp_path / "text"))
    run("--precision", "int8")
    trained, given, none = taken
    assert trained is not None and all(map(torch.equal, trained, quality.calibration(checkpoint)))
    assert given is not None and {*torch.cat(given).tolist()} == {97, 98}
    assert none is None
    RamNetForCausalLM(TINY.model_copy(update={"vocab_size": 300})).save_pretrained(tmp_path / "tokens")
    command = [str(tmp_path / "tokens"), "--output", str(tmp_path / "out"), "--format", kind, "--precision", "int4"]
    refused = CliRunner().invoke(export, [*command, "--calibrate", str(tmp_path / "text")])
    assert "--calibrate reads bytes, and the model has 300 tokens" in str(refused.exception)
    assert "--calibrate needs --precision int4" in run("--precision", "int8", "--calibrate", str(tmp_path / "text"))


def test_bits_are_those_of_bytes_also_if_tokens_are_words(tmp_path: Path) -> None:
    tokenizers = pytest.importorskip("tokenizers", reason="the tokens are of the package tokenizers")
    words = {"[UNK]": 0, "alpha": 1, "beta": 2, "gamma": 3}
    made = tokenizers.Tokenizer(tokenizers.models.WordLevel(words, unk_token="[UNK]"))
    made.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
    made.save(str(tmp_path / "tokenizer.json"))
    (tmp_path / "text").write_text("alpha beta gamma beta " * 100)
    options = ["--steps", "1", "--batch-size", "1", "--length", "16", "--kernels", "reference"]
    named = ["--data", str(tmp_path / "text"), "--tokenizer", str(tmp_path / "tokenizer.json")]
    run = tmp_path / "run"
    done = CliRunner().invoke(train, ["text", *named, "--output", str(run), *options], catch_exceptions=False)
    trained = float(re.search(r"bits per byte (\d\.\d+)", done.output)[1])
    model = RamNetForCausalLM.from_pretrained(run).eval()
    text = quality.held_out(run)
    measured = quality.measure(model, text, lambda ids: model(torch.tensor(ids[None])).logits[0].numpy())
    assert measured.float32 == pytest.approx(trained, abs=1e-3)
    assert measured.bits_per_byte == pytest.approx(measured.float32, rel=1e-4)
