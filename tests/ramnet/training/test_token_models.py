"""Models of a tokenizer's tokens: their training is resumed, and commands that take text find the tokenizer."""

from collections.abc import Callable, Sequence
from pathlib import Path

import pytest
import torch

from ramnet import RamNetConfig, RamNetForCausalLM
from ramnet.training.checkpoint import tokenizer_of
from ramnet.training.tokens import Tokenizer
from tests.ramnet.training.test_tokens import TEXTS, files_of, words

tokenizers = pytest.importorskip("tokenizers", reason="the tokens are of the package tokenizers")
BYTES_OF = {"a": 0, "b": 1, "Ġ": 2, "c": 3, "Ã": 4, "©": 5, "Ġc": 6}  # of "ab cé", and the pair " c"


def training(
    files: Sequence[Path], tokenizer: Path, output: Path, steps: int = 1, length: int = 4, batch_size: int = 2
) -> tuple[object, ...]:
    """The command that trains on the tokens of ``files``."""
    text = ("train", "text", "--data", *files, "--tokenizer", tokenizer, "--kernels", "reference", "--output", output)
    return (*text, "--steps", steps, "--length", length, "--batch-size", batch_size)


def test_the_command_trains_on_tokens_and_refuses_changed_text(
    tmp_path: Path, command_line: Callable[..., int], capsys: pytest.CaptureFixture[str]
) -> None:
    output, path = tmp_path / "run", words(tmp_path / "tokenizer.json")
    files = files_of(tmp_path / "data", *TEXTS)
    assert command_line(*training(files, path, output), "--carry") == 0
    again = ("train", "text", "--resume", "--output", output, "--kernels", "reference", "--steps", "2")
    capsys.readouterr()
    assert command_line(*again) == 0
    assert "after 2 steps" in capsys.readouterr().out
    kept = {path.name: path.read_bytes() for path in (output / "tokens").iterdir()}
    moved = [*map(str, files_of(tmp_path / "moved", *TEXTS))]
    path.rename(tmp_path / "other.json")
    again = (*again[:-1], "3", "--tokenizer", tmp_path / "other.json")
    assert command_line(*again, "--data", *moved) == 0, "the same text elsewhere"
    (tmp_path / "moved" / "1.txt").write_text("cd ab ab")
    assert command_line(*again, "--data", *moved) == 1
    assert capsys.readouterr().err == (
        "ramnet: the text or its tokenizer is not that of the run that is resumed; give its files as they were, or"
        " start a new run from its weights\n"
    )
    assert {path.name: path.read_bytes() for path in (output / "tokens").iterdir()} == kept


def test_text_is_no_bytes_to_a_model_of_tokens(
    tmp_path: Path, command_line: Callable[..., int], capsys: pytest.CaptureFixture[str]
) -> None:
    """Of 256 ids, so that its size does not tell."""
    output, path = tmp_path / "run", words(tmp_path / "tokenizer.json")
    files = files_of(tmp_path / "data", *TEXTS)
    assert command_line(*training(files, path, output)) == 0
    for command in (
        ("trace", output, "ab", "--output", tmp_path / "new"),
        ("export", output, "--output", tmp_path / "new"),
    ):
        capsys.readouterr()
        assert command_line(*command) == 1
        assert f"{output} has the tokens of {path}; text needs a byte-level model" in capsys.readouterr().err
    assert not (tmp_path / "new").exists()


def test_text_is_continued_in_the_tokens_of_training(
    tmp_path: Path, command_line: Callable[..., int], capsys: pytest.CaptureFixture[str]
) -> None:
    made = tokenizers.Tokenizer(tokenizers.models.BPE(BYTES_OF, [("Ġ", "c")]))
    made.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    made.decoder = tokenizers.decoders.ByteLevel()
    made.save(str(tmp_path / "tokenizer.json"))
    output, files = tmp_path / "run", files_of(tmp_path / "data", *("ab cé ab cé ab cé ab cé" for _ in range(3)))
    assert command_line(*training(files, tmp_path / "tokenizer.json", output, steps=150, length=12, batch_size=8)) == 0
    capsys.readouterr()
    run = ("generate", "ab c", "--checkpoint", output, "--temperature", 0)
    assert command_line(*run, "--max-new-tokens", 8) == 0
    assert capsys.readouterr().out == "ab cé ab cé\n"
    assert command_line(*run, "--stop", " ab") == 0
    assert capsys.readouterr().out == "ab cé ab\n"
    (tmp_path / "tokenizer.json").rename(tmp_path / "moved.json")
    assert command_line(*run) == 1
    assert f"{tmp_path / 'tokenizer.json'} cannot be read" in capsys.readouterr().err
    (tmp_path / "moved.json").rename(output / "tokenizer.json")
    assert command_line(*run, "--stop", " ab") == 0
    assert capsys.readouterr().out == "ab cé ab\n"


def test_a_stop_string_may_begin_with_the_space_of_the_first_token(
    tmp_path: Path, command_line: Callable[..., int], capsys: pytest.CaptureFixture[str]
) -> None:
    """Decoders of this kind leave out the space of a text's first word."""
    pieces = [("<unk>", 0.0), ("▁yes", -1.0), ("▁no", -1.0), ("x", -1.0)]
    made = tokenizers.Tokenizer(tokenizers.models.Unigram(pieces, unk_id=0))
    made.pre_tokenizer, made.decoder = tokenizers.pre_tokenizers.Metaspace(), tokenizers.decoders.Metaspace()
    model = RamNetForCausalLM(RamNetConfig.preset("tiny", vocab_size=4, hidden_size=8))
    with torch.no_grad():
        model.norm.weight.zero_()
        model.norm.bias.fill_(1.0)
        model.head.weight.copy_(torch.tensor([0.0, 0, 1, 0]).unsqueeze(1))  # whatever was read, " no" follows
    model.save_pretrained(tmp_path)
    made.save(str(tmp_path / "tokenizer.json"))
    run = ("--checkpoint", tmp_path, "--temperature", 0, "--max-new-tokens", 3)
    assert command_line("generate", "yes", *run) == 0
    assert capsys.readouterr().out == "yes no no no\n"
    assert command_line("generate", "yes", *run, "--stop", " no") == 0
    assert capsys.readouterr().out == "yes no\n"
    made.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
    made.save(str(tmp_path / "tokenizer.json"))
    assert command_line("generate", " ", *run) == 1
    assert capsys.readouterr() == ("", f"ramnet: TEXT ' ' has no tokens of {tmp_path}; give other text to continue\n")


def test_bytes_that_are_no_utf8_do_not_end_a_stream(tmp_path: Path) -> None:
    names = {f"<0x{byte:02X}>": byte for byte in range(256)} | {"▁a": 256}
    made = tokenizers.Tokenizer(tokenizers.models.BPE(names, [], byte_fallback=True))
    decoders = tokenizers.decoders
    made.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()])
    made.save(str(tmp_path / "tokenizer.json"))
    step = Tokenizer(tmp_path / "tokenizer.json", 257).stream([])
    text = "".join(map(step, [10, 0xC3, 256, 256, 10, *"é".encode(), 256]))
    assert "\ufffd" in text and text.endswith(" a\né a")


def test_a_model_is_read_without_its_training_file_and_a_tokenizer_of_bytes_is_one_of_bytes(
    tmp_path: Path, command_line: Callable[..., int]
) -> None:
    hf = pytest.importorskip("ramnet.hf", reason="the tokenizer of bytes is of transformers")
    RamNetForCausalLM(RamNetConfig.preset("tiny")).save_pretrained(tmp_path)
    (tmp_path / "training.safetensors").write_text("damaged")
    assert tokenizer_of(tmp_path) is None
    assert command_line("generate", "ab", "--checkpoint", tmp_path, "--max-new-tokens", 1) == 0
    hf.byte_tokenizer().save_pretrained(tmp_path)
    assert tokenizer_of(tmp_path) is None
    words(tmp_path / "tokenizer.json")
    assert tokenizer_of(tmp_path) == tmp_path / "tokenizer.json"


def test_a_checkpoint_of_tokens_is_converted_with_its_tokenizer(
    tmp_path: Path, command_line: Callable[..., int]
) -> None:
    hf = pytest.importorskip("ramnet.hf.tokenizer", reason="the other format is of transformers")
    output, path = tmp_path / "run", words(tmp_path / "tokenizer.json")
    files = files_of(tmp_path / "data", *TEXTS)
    assert command_line(*training(files, path, output)) == 0
    with pytest.raises(ValueError, match=f"^{output} has the tokens of {path}; give it by --tokenizer$"):
        hf.read_tokenizer(None, output, 256)
    assert command_line("convert", output, tmp_path / "hf") == 0
    assert (tmp_path / "hf" / "tokenizer.json").read_bytes() == path.read_bytes()
    path.unlink()
    assert command_line("convert", output, tmp_path / "none") == 1 and not (tmp_path / "none").exists()
    (output / "tokenizer.json").write_bytes((tmp_path / "hf" / "tokenizer.json").read_bytes())
    assert command_line("convert", output, tmp_path / "again") == 0
