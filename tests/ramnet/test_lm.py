"""The language-modelling experiment compares models of one size on the same text."""

from __future__ import annotations

import json
import math
import os
from pathlib import Path

import pytest
import torch
from click.testing import CliRunner

from ramnet.lm import plan, report
from ramnet.lm.cli import lm
from ramnet.lm.plan import SCALES, Scale, configurations, ram_net, sweep
from ramnet.lm.task import SPANS, Compared, bits_of, repeated
from ramnet.loss import IGNORED
from ramnet.training.batch import Batch
from ramnet.training.model import make, parameter_count
from ramnet.training.sweep import Run
from tests.ramnet.training import sweeps
from tests.ramnet.training.sweeps import outcome_of, trained

__all__ = ["trained"]

SMALL = Scale(32, 2, length=16, contexts=(8, 16, 32), batch_size=2, search_steps=2, steps=4, seeds=(0, 1))


PREDICTED = 8


@pytest.fixture(autouse=True)
def _few_predicted(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("ramnet.lm.task.PREDICTED", PREDICTED)


@pytest.fixture
def files(tmp_path: Path) -> list[str]:
    paths = [tmp_path / f"{i}.txt" for i in range(3)]
    for i, path in enumerate(paths):
        path.write_text(f"name{i} = other{i} + name{i}\n" * 12)
    return [str(path) for path in paths]


def test_models_have_the_same_number_of_parameters_within_two_percent() -> None:
    for scale in SCALES.values():
        models = configurations(scale)
        assert len(models) == 8
        for end in ("", " + convolutions"):
            (wanted, *others) = (parameter_count(c) for name, c in models.items() if name.endswith("s") == bool(end))
            assert all(abs(count / wanted - 1) < 0.02 for count in others)


def test_only_convolutions_tell_the_two_kinds_apart() -> None:
    models = configurations(SCALES["quick"])
    for name, config in models.items():
        assert config.conv_layers == (2 if name.endswith("convolutions") else 0)
    assert {(c.hidden_size, c.num_layers, c.final_gain) for c in models.values()} == {(128, 2, 1.0)}


def test_the_models_that_end_lower_from_small_embeddings_begin_with_them() -> None:
    starts = {name: config.embedding_std for name, config in configurations(SCALES["quick"]).items()}
    smaller = {"Transformer++ + convolutions", "Gated DeltaNet + convolutions"}
    assert starts == {name: 0.02 if name in smaller else 1.0 for name in starts}


def test_the_scores_are_bits_of_all_labels_of_repeated_names_and_by_context(files: list[str]) -> None:
    task = Compared(files, 16, SMALL.contexts)
    model = make(ram_net(SMALL, 0))
    with torch.no_grad():
        model.head.weight.zero_()  # every byte has 8 bits
    assert task.scores(model) == pytest.approx([8.0] * 5)


def test_bits_are_those_of_the_models_logits() -> None:
    model = make(ram_net(SMALL, 0))
    ids = torch.randint(256, (3, 9), generator=torch.Generator().manual_seed(0))
    labels = ids[:, 1:].clone()
    labels[1, 2:] = IGNORED
    bits = bits_of(model, Batch(ids[:, :-1], labels))
    probability = model(ids[:, :-1]).logits.detach().softmax(-1)
    for row in range(3):
        for t in range(8):
            expected = 0 if labels[row, t] == IGNORED else -math.log2(probability[row, t, labels[row, t]])
            assert float(bits[row, t]) == pytest.approx(expected, abs=1e-5)


def marked(text: bytes) -> bytes:
    """Return the bytes of a window that count as repeated."""
    row = torch.tensor(list(text))
    mask = repeated(Batch(row[None, :-1], row[None, 1:]))[0]
    return bytes(byte for byte, counted in zip(text[1:], mask, strict=True) if counted)


def test_repeated_names_are_words_that_stand_before_without_their_first_byte() -> None:
    assert marked(b"value = value + values") == b"alue"
    assert marked(b"abc abc abc") == b"", "three letters are no name"
    assert marked(b"x9_y (x9_y, 1234, 1234)") == b"9_y", "a number is no name"
    assert marked(b"self self self") == b"elfelf"


def test_labels_beyond_a_window_are_not_marked() -> None:
    row = torch.tensor(list(b"name name"))
    labels = row[1:].clone()
    labels[-2:] = IGNORED
    assert int(repeated(Batch(row[None, :-1], labels[None])).sum()) == 0, "the name is cut off"


def test_the_same_bytes_end_every_window(files: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[Batch] = []

    def bits(model: object, batch: Batch) -> torch.Tensor:
        seen.append(batch)
        return torch.zeros(batch.labels.shape)

    monkeypatch.setattr("ramnet.lm.task.bits_of", bits)
    Compared(files, 16, SMALL.contexts).by_context(make(ram_net(SMALL, 0)))
    assert [batch.inputs.shape for batch in seen] == [(SPANS, context) for context in SMALL.contexts]
    for batch in seen:
        assert int((batch.labels != IGNORED).sum()) == SPANS * PREDICTED
        assert torch.equal(batch.labels[:, -PREDICTED:], seen[0].labels[:, -PREDICTED:])
        assert torch.equal(batch.inputs[:, -PREDICTED:], seen[0].inputs[:, -PREDICTED:])
        assert torch.equal(batch.inputs[:, 1:][:, -PREDICTED + 1 :], batch.labels[:, -PREDICTED:-1])


def test_held_out_text_that_is_too_short_is_refused(files: list[str]) -> None:
    with pytest.raises(ValueError, match=r"longest held-out document holds \d+ bytes; a window of 10000 needs 10001"):
        Compared(files, 16, (16, 10_000))
    with pytest.raises(ValueError, match=r"^no name is repeated within 4 bytes of the held-out text; give more text$"):
        Compared(files, 4, (8,))


def test_the_command_writes_a_table_data_and_two_pictures(
    trained: list[Run], files: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("matplotlib", reason="the pictures need matplotlib: pip install 'ramnet[tune]'")
    monkeypatch.setitem(plan.SCALES, "quick", SMALL)
    monkeypatch.setattr(sweeps, "outcome_of", lambda run: outcome_of(run, (2.0, 1.0, 3.0, 2.5, 2.25)))
    output = tmp_path / "lm"
    run = sweep(SMALL, files).final_run("RAM-Net", 1e-3, 0)
    (output / run.key()).mkdir(parents=True)
    (output / run.key() / "metrics.jsonl").write_text('{"step": 1, "loss": 5.5}\n{"step": 2, "loss": 5.0}\n')
    arguments = [*(argument for file in files for argument in ("--data", file)), "--output", str(output)]
    done = CliRunner().invoke(lm, arguments, catch_exceptions=False)
    assert done.exit_code == 0, done.output
    rows = (output / report.TABLE).read_text().splitlines()
    assert rows[0].startswith("| model | parameters | state | held out | repeated names | window 8 | window 16 |")
    assert len(rows) == 2 + 8 + 2
    means = ("2.000 ± 0.000", "1.000 ± 0.000", "3.000 ± 0.000", "2.500 ± 0.000", "2.250 ± 0.000")
    assert rows[2].endswith(f"| {' | '.join((*means, '128', '0.001', '2'))} |")
    facts = json.loads((output / report.DATA).read_text())
    assert facts[0]["by_context"] == {"8": [3.0, 0.0], "16": [2.5, 0.0], "32": [2.25, 0.0]}
    for picture in (report.BY_STEP, report.BY_CONTEXT):
        assert (output / picture).read_bytes().startswith(b"\x89PNG")
    assert rows[-1].startswith("steps.png lacks Transformer++, GLA, ")
    assert rows[-1].endswith(", Gated DeltaNet + convolutions, whose losses are not in this folder.")
    arguments[-1] = str(tmp_path / "elsewhere")
    done = CliRunner().invoke(lm, arguments, catch_exceptions=False)
    assert done.output.splitlines()[-3:] == [
        str(tmp_path / "elsewhere" / name) for name in (report.DATA, report.TABLE, report.BY_CONTEXT)
    ], "without a picture of losses that are not there"


def test_text_that_was_moved_is_known_and_a_pipe_is_refused(files: list[str], tmp_path: Path) -> None:
    before = sweep(SMALL, files).final_run("RAM-Net", 1e-3, 0).key()
    (tmp_path / "moved").mkdir()
    moved = [str(Path(file).rename(tmp_path / "moved" / Path(file).name)) for file in files]
    assert sweep(SMALL, moved).final_run("RAM-Net", 1e-3, 0).key() == before
    Path(moved[0]).write_text(Path(moved[0]).read_text().replace("name0", "name9"))
    assert sweep(SMALL, moved).final_run("RAM-Net", 1e-3, 0).key() != before
    os.mkfifo(tmp_path / "pipe")
    with pytest.raises(ValueError, match=f"^{tmp_path / 'pipe'} is a pipe, which can be read only once"):
        sweep(SMALL, [str(tmp_path / "pipe")])
