"""Text: which files are held out, what a window is, and what its loss means."""

import json
import math
from collections import Counter
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from ramnet import RamNetConfig, RamNetForCausalLM
from ramnet.loss import IGNORED
from ramnet.training import Recipe, train
from ramnet.training.text import Text, split_files, standard_library
from ramnet.training.tokens import Tokens
from ramnet.training.windows import Windows


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
    assert len(held_out) == 2
    assert sorted(training + held_out) == sorted(b"<%d>" % i * 20 for i in range(45))


def test_of_one_file_the_last_tenth_is_held_out(tmp_path: Path) -> None:
    file = tmp_path / "one.txt"
    file.write_bytes(bytes(range(100)))
    assert split_files([file]) == ([bytes(range(90))], [bytes(range(90, 100))])


DOCUMENTS = (b"0123456789ABC", b"ab", b"", b"x", b"vwxyz")


def _spelled(inputs: torch.Tensor, labels: torch.Tensor) -> list[bytes]:
    """Check the padding of each window and return its bytes with the last label."""
    counted = labels != IGNORED
    filled = counted.sum(1)
    assert bool((filled > 0).all())
    assert torch.equal(counted, torch.arange(labels.shape[1]) < filled.unsqueeze(1)), "padding comes last"
    assert bool((inputs[~counted] == 0).all())
    both = torch.cat([inputs[:, :1], labels], dim=1)
    assert torch.equal(inputs[counted], both[:, :-1][counted]), "a label is the next input"
    return [bytes(row[: n + 1]) for row, n in zip(both.tolist(), filled.tolist(), strict=True)]


@pytest.mark.parametrize("length", [1, 2, 4, 5, 12, 40])
def test_a_window_lies_within_one_document_and_every_byte_is_in_as_many(length: int) -> None:
    windows = Windows(Tokens.of_bytes(DOCUMENTS), length)
    inputs, labels, *_ = windows.take(torch.arange(len(windows)))
    assert inputs.shape == labels.shape == (len(windows), length)
    # In plain Python: every position of a window, clipped to the document.
    described = [
        document[max(start, 0) : start + length + 1]
        for document in DOCUMENTS
        for start in range(1 - length, len(document) - 1)
        if len(document) > 1
    ]
    assert _spelled(inputs, labels) == described
    # Bytes differ between these documents. Each is an input, and each but the first of its document a label.
    followed = Counter(b"".join(document[:-1] for document in DOCUMENTS if len(document) > 1))
    follows = Counter(b"".join(document[1:] for document in DOCUMENTS if len(document) > 1))
    assert Counter(inputs[labels != IGNORED].tolist()) == Counter(dict.fromkeys(followed, length))
    assert Counter(labels[labels != IGNORED].tolist()) == Counter(dict.fromkeys(follows, length))


def test_a_batch_draws_all_training_windows_equally(tmp_path: Path) -> None:
    files = _files(tmp_path / "a", 3)
    text, draws = Text(files, length=5), 20_000
    inputs, labels, *_ = text.batch(draws, torch.Generator().manual_seed(0))
    found = Counter(_spelled(inputs, labels))
    every = Counter(_spelled(*text.training.take(torch.arange(len(text.training)))[:2]))
    assert found.keys() == every.keys()
    for window, count in every.items():
        expected = draws * count / len(text.training)
        assert abs(found[window] - expected) <= 5 * expected**0.5  # five standard deviations


def test_a_run_with_other_windows_is_not_resumed(tmp_path: Path) -> None:
    config = RamNetConfig(
        vocab_size=256, hidden_size=8, num_layers=1, num_heads=1, value_dim=4, order=2, sub_dim=2, top_k=2
    )
    text, recipe = Text(_files(tmp_path / "a", 3), length=6), Recipe(steps=1, batch_size=2)
    train(RamNetForCausalLM(config), text, recipe, output=tmp_path / "run")
    path = tmp_path / "run" / "training.safetensors"
    with safe_open(path, "pt") as file:
        progress = json.loads(file.metadata()["progress"])
    del progress["task"]["windows"]  # as written by the version whose windows spanned files
    save_file(load_file(path), path, metadata={"progress": json.dumps(progress)})
    with pytest.raises(ValueError, match=r"^windows is 'within a document' but the run in .* has no windows; start"):
        train(RamNetForCausalLM(config), text, recipe, output=tmp_path / "run", resume=True)


def test_uniform_predictions_have_eight_bits_per_byte(tmp_path: Path) -> None:
    config = RamNetConfig(
        vocab_size=256, hidden_size=8, num_layers=1, num_heads=1, value_dim=4, order=2, sub_dim=2, top_k=2
    )
    model = RamNetForCausalLM(config)
    text = Text(_files(tmp_path / "a", 3), length=6)
    torch.nn.init.zeros_(model.head.weight)
    assert text.evaluate(model) == pytest.approx(8)
    # A head that always says the digit, with logit 2 over 255 others: −log2 softmax, by the digit's share. All windows
    # are measured, being few, so that each byte but the first counts as much.
    ((_, *labels),) = split_files(_files(tmp_path / "b", 3))[1]
    digit, share = labels[0], 20 / len(labels)
    model.norm.weight.data.zero_()
    model.norm.bias.data.fill_(1)
    model.head.weight.data[digit] = 2 / 8
    assert text.evaluate(model) == pytest.approx((math.log(math.exp(2) + 255) - 2 * share) / math.log(2))


def test_text_that_cannot_be_used_is_named(tmp_path: Path) -> None:
    empty, short = tmp_path / "empty.txt", tmp_path / "short.txt"
    empty.write_bytes(b"")
    short.write_bytes(b"abc" * 5)
    with pytest.raises(ValueError, match=r"missing\.txt cannot be read: No such file"):
        Text([tmp_path / "missing.txt"])
    with pytest.raises(ValueError, match="cannot be read: Is a directory"):
        Text([tmp_path])
    with pytest.raises(ValueError, match="the longest document of the training text holds 0 bytes; it needs at least"):
        Text([empty], length=8)
    with pytest.raises(ValueError, match="the longest document of the held-out text holds 1 bytes; it needs at least"):
        Text([short], length=8)
    with pytest.raises(ValueError, match="length is 0"):
        Text([short], length=0)
