"""Text: which files are held out, what a window is, and what its loss means."""

import math
from pathlib import Path

import pytest
import torch

from ramnet import RamNetConfig, RamNetForCausalLM
from ramnet.training.text import Text, split_files, standard_library


def _files(folder: Path, count: int) -> list[Path]:
    folder.mkdir(parents=True)
    files = [folder / f"{i}.txt" for i in range(count)]
    for i, file in enumerate(files):
        file.write_bytes(b"<%d>" % i * 20)
    return files


def test_the_standard_library_is_the_default_without_its_tests() -> None:
    names = {path.name for path in standard_library()}
    assert {"argparse.py", "dataclasses.py"} <= names
    assert "test_argparse.py" not in names
    text = Text(length=64)
    assert len(text.training) > 10 * len(text.held_out) > 100_000
    assert Text(length=64).describe() == text.describe()


def test_files_are_held_out_whole_wherever_the_folder_is(tmp_path: Path) -> None:
    training, held_out = split_files(_files(tmp_path / "a", 45))
    assert (training, held_out) == split_files(_files(tmp_path / "b", 45))
    assert len(held_out.split(b"\0")) == 2
    assert sorted((training + b"\0" + held_out).split(b"\0")) == sorted(b"<%d>" % i * 20 for i in range(45))


def test_of_one_file_the_last_tenth_is_held_out(tmp_path: Path) -> None:
    file = tmp_path / "one.txt"
    file.write_bytes(bytes(range(100)))
    assert split_files([file]) == (bytes(range(90)), bytes(range(90, 100)))


def test_windows_are_training_bytes_and_labels_the_bytes_after(tmp_path: Path) -> None:
    files = _files(tmp_path / "a", 3)
    text = Text(files, length=5)
    training, _ = split_files(files)
    inputs, labels = text.batch(4000, torch.Generator().manual_seed(0))
    assert inputs.shape == labels.shape == (4000, 5)
    windows = {training[i : i + 6] for i in range(len(training) - 5)}
    seen = {bytes([*ids, wanted[-1]]) for ids, wanted in zip(inputs.tolist(), labels.tolist(), strict=True)}
    assert torch.equal(inputs[:, 1:], labels[:, :-1])
    assert seen == windows


def test_bits_per_byte_of_a_model_that_knows_nothing_is_eight(tmp_path: Path) -> None:
    config = RamNetConfig(
        vocab_size=256, hidden_size=8, num_layers=1, num_heads=1, value_dim=4, order=2, sub_dim=2, top_k=2
    )
    model = RamNetForCausalLM(config)
    text = Text(_files(tmp_path / "a", 3), length=6)
    torch.nn.init.zeros_(model.head.weight)
    assert text.evaluate(model) == pytest.approx(8)
    # A head that always says "0" with logit x over 255 others: −log2 softmax, by the share of "0" in the windows.
    model.norm.weight.data.zero_()
    model.norm.bias.data.fill_(1)
    model.head.weight.data[ord("0")] = 2 / 8
    starts = torch.linspace(0, len(text.held_out) - 7, 128, dtype=torch.float64).long()
    labels = torch.stack([text.held_out[i + 1 : i + 7] for i in starts.tolist()])
    share = (labels == ord("0")).double().mean().item()
    assert text.evaluate(model) == pytest.approx((math.log(math.exp(2) + 255) - 2 * share) / math.log(2))


def test_text_that_cannot_be_used_is_named(tmp_path: Path) -> None:
    empty, short = tmp_path / "empty.txt", tmp_path / "short.txt"
    empty.write_bytes(b"")
    short.write_bytes(b"abc" * 20)
    with pytest.raises(ValueError, match=r"missing\.txt cannot be read: No such file"):
        Text([tmp_path / "missing.txt"])
    with pytest.raises(ValueError, match="cannot be read: Is a directory"):
        Text([tmp_path])
    with pytest.raises(ValueError, match="the training text holds 0 bytes; windows of 8 need at least 9"):
        Text([empty], length=8)
    with pytest.raises(ValueError, match="the held-out text holds 6 bytes; windows of 8 need at least 9"):
        Text([short], length=8)
    with pytest.raises(ValueError, match="length is 0"):
        Text([short], length=0)
