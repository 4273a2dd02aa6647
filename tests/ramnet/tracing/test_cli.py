"""``ramnet trace`` writes a picture and a page, and says what is wrong in one sentence."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

import ramnet
from ramnet import RamNetConfig, RamNetForCausalLM
from ramnet.files import read_text
from ramnet.tracing import page, picture
from ramnet.tracing.heads import heads_of
from tests.ramnet.tracing.conftest import CONFIG, data_of

pytest.importorskip("matplotlib", reason="the picture needs matplotlib: pip install 'ramnet[tune]'")

TEXT = "A text of <b>bytes</b>:\n\té"


@pytest.fixture
def undrawn(monkeypatch: pytest.MonkeyPatch) -> None:
    """Write an empty picture: drawing takes a second."""
    monkeypatch.setattr(picture, "save_picture", lambda heads, labels, path: path.write_bytes(b""))


def test_it_writes_a_picture_and_a_page_and_prints_a_table(
    checkpoint: Path, tmp_path: Path, command_line: Callable[..., int], capsys: pytest.CaptureFixture[str]
) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert command_line("trace", checkpoint, TEXT + "漢", "--head", 2, "--output", tmp_path / "new") == 0
    out = capsys.readouterr().out
    assert out.count("Layer 1, head 2") == out.count("Layer 2, head 2") == 1 and "trace.png, trace.html" in out
    assert (tmp_path / "new" / "trace.png").read_bytes().startswith(b"\x89PNG")
    data = data_of(tmp_path / "new" / "trace.html")
    assert "".join(data["labels"]) == TEXT[:-1] + "\\xc3é\\xe6\\xbc漢" and not data["cut"]
    head = data["heads"][1]
    exact = heads_of(
        ramnet.trace(RamNetForCausalLM.from_pretrained(checkpoint), torch.tensor([list((TEXT + "漢").encode())]))
    )[3]
    assert head["writeSlots"] == exact.accesses.write_slots.flatten().tolist()
    assert head["sources"] == exact.sources.flatten().tolist()
    assert head["shares"] == [round(100 * share) for share in exact.shares.flatten().tolist()]


def test_no_token_ends_the_pages_script_or_is_read_as_mathematics(checkpoint: Path, tmp_path: Path) -> None:
    trace = ramnet.trace(RamNetForCausalLM.from_pretrained(checkpoint), torch.tensor([[1, 2]]))
    heads, labels = heads_of(trace, layers=[1], heads=[1]), ["</script><!--", r"$\nothing$"]
    page.save_page(heads, labels, tmp_path / "page.html")
    text = read_text(tmp_path / "page.html")
    assert text.count("</script>") == 2 and "<!--" not in text and data_of(tmp_path / "page.html")["labels"] == labels
    picture.save_picture(heads, labels, tmp_path / "picture.png")


@pytest.mark.usefixtures("undrawn")
def test_ids_are_read_for_a_model_of_other_tokens(
    tmp_path: Path, command_line: Callable[..., int], capsys: pytest.CaptureFixture[str]
) -> None:
    RamNetForCausalLM(CONFIG.model_copy(update={"vocab_size": 300})).save_pretrained(tmp_path / "model")
    assert command_line("trace", tmp_path / "model", "7 299 7", "--ids", "--head", 1, "--output", tmp_path / "out") == 0
    data = data_of(tmp_path / "out" / "trace.html")
    assert data["labels"] == ["7", "299", "7"] and data["whole"] and len(data["heads"]) == 2
    capsys.readouterr()
    for text, message in (
        ("7 300", "ramnet: input_ids holds 300; token ids must be in 0..299"),
        ("7 x", "'x' is not a token id; with --ids, TEXT holds integers separated by spaces"),
        (" ", "TEXT is empty; give at least one token"),
    ):
        assert command_line("trace", tmp_path / "model", text, "--ids", "--output", tmp_path / "none") != 0
        assert message in capsys.readouterr().err and not (tmp_path / "none").exists()
    assert command_line("trace", tmp_path / "model", "text", "--output", tmp_path / "none") == 1
    assert "has 300 tokens; text needs a byte-level model, of 256; give --ids for token ids" in capsys.readouterr().err


@pytest.mark.usefixtures("undrawn")
def test_a_long_text_is_cut_and_said_so(
    checkpoint: Path, tmp_path: Path, command_line: Callable[..., int], capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    numbers = 4 * (4 * CONFIG.top_k + 2 * 6 + 1)  # of a token
    monkeypatch.setattr(page, "MOST_NUMBERS", 8 * numbers)
    assert command_line("trace", checkpoint, "0123456789", "--output", tmp_path) == 0
    assert (
        "trace.html shows the first 8 of 10 tokens; choose fewer heads by --layer and --head" in capsys.readouterr().out
    )
    data = data_of(tmp_path / "trace.html")
    assert data["labels"] == [*"01234567"] and data["cut"] == "The page shows the first 8 of 10 tokens."
    assert all(len(head["before"]) == 8 for head in data["heads"])


def test_a_page_of_1000_tokens_of_tiny_is_below_2_megabytes(tmp_path: Path) -> None:
    torch.manual_seed(0)
    model = RamNetForCausalLM(RamNetConfig.preset("tiny"))
    heads = heads_of(ramnet.trace(model, torch.randint(256, (1, 100))))
    assert page.tokens_in_page(heads) > 1000
    page.save_page(heads, ["x"] * 100, tmp_path / "page.html")
    assert 10 * (tmp_path / "page.html").stat().st_size < 2e6


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([""], "TEXT is empty; give at least one token"),
        (["x", "--layer", "3"], "ramnet: layer 3 is not there; there are layers 1..2"),
        (["x", "--kernels", "abacus"], "ramnet: backend 'abacus' is unknown; there are "),
    ],
)
@pytest.mark.usefixtures("undrawn")
def test_what_is_wrong_is_said_and_nothing_is_written(
    checkpoint: Path, tmp_path: Path, arguments: list[str], message: str,
    command_line: Callable[..., int], capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    assert command_line("trace", checkpoint, *arguments, "--output", tmp_path / "new") != 0
    assert message in capsys.readouterr().err
    assert not any(tmp_path.iterdir())


def test_a_folder_without_a_model_is_named(
    tmp_path: Path, command_line: Callable[..., int], capsys: pytest.CaptureFixture[str]
) -> None:
    assert command_line("trace", tmp_path / "none", "x", "--output", tmp_path / "new") == 1
    assert capsys.readouterr().err == f"ramnet: {tmp_path / 'none'} is not a checkpoint: it has no config.json\n"
    assert not (tmp_path / "new").exists()


def test_output_that_cannot_be_written_is_named_before_the_model_is_read(
    tmp_path: Path, command_line: Callable[..., int], capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "file").write_text("kept")
    assert command_line("trace", tmp_path / "none", "x", "--output", tmp_path / "file") == 1
    assert capsys.readouterr().err == f"ramnet: {tmp_path / 'file' / 'trace.png'} cannot be written: Not a directory\n"
    assert (tmp_path / "file").read_text() == "kept"


def test_without_matplotlib_nothing_is_run(
    tmp_path: Path,
    command_line: Callable[..., int],
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("ramnet.tracing.cli.find_spec", lambda name: None)
    assert command_line("trace", tmp_path, "x", "--output", tmp_path / "new") == 1
    assert capsys.readouterr().err == "Error: the picture needs matplotlib: pip install 'ramnet[tune]'\n"


@pytest.mark.usefixtures("undrawn")
def test_a_page_that_cannot_be_written_leaves_the_old_picture(
    checkpoint: Path, tmp_path: Path, command_line: Callable[..., int], monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "trace.png").write_text("old")

    def full(*_: object, **__: object) -> None:
        raise OSError("no space left")

    monkeypatch.setattr(page, "write_text_atomic", full)
    assert command_line("trace", checkpoint, "x", "--output", tmp_path) == 1
    assert [path.name for path in tmp_path.iterdir()] == ["trace.png"] and (tmp_path / "trace.png").read_text() == "old"
