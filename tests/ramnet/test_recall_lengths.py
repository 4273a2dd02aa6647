"""Recall at lengths that a model was not trained on."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from ramnet import RamNetForCausalLM
from ramnet.loss import IGNORED
from ramnet.recall import lengths
from ramnet.recall.lengths import Accuracy, answers, measure
from ramnet.training import Recipe, train
from ramnet.training.mqar import Mqar
from ramnet.training.sweep import Outcome
from tests.ramnet.training.runs import SMALL, TASK, fresh


def test_blocks_with_a_carried_state_answer_as_the_whole_sequence_does(monkeypatch: pytest.MonkeyPatch) -> None:
    model = fresh()
    model.blocks[0].mixer.output.weight.data *= 1000  # what is most probable depends on the memory
    inputs, labels = Mqar(3, 40, 64).batch(4, torch.Generator().manual_seed(0))
    with torch.no_grad():
        # Half of the labels are what the model says.
        said = model(inputs).logits.argmax(-1)
    labels = torch.where((labels != IGNORED) & (torch.arange(4) % 2 == 0).unsqueeze(1), said, labels)
    read: list[int] = []
    monkeypatch.setattr(lengths, "BLOCK", 7)
    model.embedding.register_forward_pre_hook(lambda _, inputs: read.append(inputs[0].shape[1]))
    found = answers(model, inputs, labels).view(4, 3)
    assert read == [7] * 5 + [5]
    assert torch.equal(found, (said == labels)[labels != IGNORED].view(4, 3).float())
    assert found[::2].min() == 1 and found[1::2].min() == 0
    model.norm.bias.data.fill_(float("nan"))
    assert bool(answers(model, inputs, labels).isnan().all())


def test_late_queries_are_those_of_the_second_half(monkeypatch: pytest.MonkeyPatch) -> None:
    """A model that knows the answers to the first half alone."""
    asked: list[tuple[int, int]] = []

    def known(_: object, inputs: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
        asked.append(tuple(inputs.shape))  # type: ignore[arg-type]
        places = (labels != IGNORED).nonzero()[:, 1]
        return (places < inputs.shape[1] // 2).float()

    monkeypatch.setattr(lengths, "answers", known)
    monkeypatch.setattr(lengths, "LENGTHS", (8, 16, 64))
    monkeypatch.setattr(lengths, "MOST_TOKENS", 64 * 40)
    found = list(measure(fresh(), 3))
    assert [(each.length, each.examples) for each in found] == [(16, 160), (64, 40)]  # 8 tokens are too few
    assert asked == [(32, 16)] * 5 + [(32, 64), (8, 64)]
    assert all(each.late == 0 < each.all < 1 for each in found)
    monkeypatch.setattr(Mqar, "batch", lambda *_: (torch.zeros(1, 16), torch.arange(16)[None] // 8 * IGNORED))
    assert next(measure(fresh(), 3)).late is None


class Bytes(Mqar):
    def describe(self) -> dict[str, object]:
        return {"task": "text"}


def test_of_a_sweep_the_first_seed_of_the_best_rate_is_measured_for_each_task(tmp_path: Path) -> None:
    """The search's run, a rate at which one of two seeds ended, a lucky seed, another task and a language model are
    not in the way."""
    runs = [
        ("a", TASK, 0.001, 0, 0.99, False), ("b", TASK, 0.0032, 1, 0.98, True), ("c", TASK, 0.01, 1, 0.6, True),
        ("d", TASK, 0.01, 0, 0.4, True), ("e", TASK, 0.032, 0, 0.7, True), ("f", TASK, 0.032, 1, 0.2, True),
        ("g", Mqar(2, 8, 64), 0.01, 0, 0.1, True), ("h", Bytes(2, 8, 64), 0.01, 0, 0.1, True),
    ]  # fmt: skip
    for folder, task, rate, seed, metric, scored in runs:
        train(fresh(), task, Recipe(steps=1, batch_size=2), output=tmp_path / folder)
        outcome = Outcome(name="RAM-Net", learning_rate=rate, steps=1, seed=seed, seconds=1.0, loss=1.0, metric=metric,
                          scores=[metric] if scored else [])  # fmt: skip
        (tmp_path / f"{folder}.json").write_text(outcome.model_dump_json())
    assert {folder.name for folder in lengths.folders(tmp_path)} == {"d", "g"}


def test_the_command_measures_every_ram_net_of_a_sweep(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, command_line: Callable[..., int],
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    pytest.importorskip("matplotlib", reason="the pictures need matplotlib: pip install 'ramnet[tune]'")
    monkeypatch.setattr(lengths, "LENGTHS", (16, 32))
    monkeypatch.setattr(lengths, "MOST_TOKENS", 64)
    sweep, output = tmp_path / "sweep", tmp_path / "lengths"
    train(fresh(), TASK, Recipe(steps=1, batch_size=2), output=sweep / "search")
    shutil.copytree(sweep / "search", sweep / "final")
    for name, metric, scores in (("search", 0.9, []), ("final", 0.5, [0.5])):
        outcome = Outcome(name="RAM-Net", learning_rate=0.01, steps=1, seed=0, seconds=1.0, loss=1.0, metric=metric,
                          scores=scores)  # fmt: skip
        (sweep / f"{name}.json").write_text(outcome.model_dump_json())
    (sweep / "recall.json").write_text("[]")
    alone = tmp_path / "alone"
    RamNetForCausalLM(SMALL).bfloat16().save_pretrained(alone)
    given = (sweep, alone, "--pairs", 2, "--kernels", "reference", "--output", output)
    assert command_line("recall-lengths", *given) == 0
    said = capsys.readouterr().out.splitlines()
    assert said[0].startswith(f"RAM-Net M=32 U=5 {sweep / 'final'}: accuracy 0.") and said[-3:] == [
        str(output / name) for name in (lengths.DATA, lengths.TABLE, lengths.PICTURE)
    ]
    head, _, *rows = (output / lengths.TABLE).read_text().splitlines()
    assert head == "| 2 pairs | state | trained | 16 | 32 |"
    assert [row.split("|")[1:4] for row in rows] == [
        [f" RAM-Net M=32 U=5 {sweep / 'final'} ", " 1152 ", f" {TASK.length} "],
        [f" RAM-Net M=32 U=5 {alone} ", " 1152 ", "  "],
    ]  # of two models of the same sizes
    facts = json.loads((output / lengths.DATA).read_text())
    assert [each["checkpoint"] for each in facts] == [str(sweep / "final"), str(alone)]
    assert [each["length"] for each in facts[0]["accuracies"]] == [16, 32] and facts[0]["pairs"] == 2
    assert Accuracy(**facts[0]["accuracies"][0]).examples == 4
    assert (output / lengths.PICTURE).read_bytes().startswith(b"\x89PNG")
    once = ("recall-lengths", alone, alone, "--pairs", 2, "--kernels", "reference", "--output", tmp_path / "once")
    assert command_line(*once) == 0 and capsys.readouterr().out.startswith("RAM-Net M=32 U=5: accuracy 0.")
    assert len(json.loads((tmp_path / "once" / lengths.DATA).read_text())) == 1
    assert command_line("recall-lengths", alone, "--pairs", 32, "--output", tmp_path / "none") == 1
    assert capsys.readouterr().err.startswith("ramnet: ") and not (tmp_path / "none").exists()


def test_a_checkpoint_that_cannot_be_read_is_named_before_anything_is_measured(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, command_line: Callable[..., int],
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    monkeypatch.setattr(lengths, "measure", lambda *_: pytest.fail("something is measured"))
    RamNetForCausalLM(SMALL).save_pretrained(tmp_path / "model")
    (tmp_path / "model" / "training.safetensors").write_bytes(b"")
    assert command_line("recall-lengths", tmp_path / "model", "--kernels", "reference", "--output", tmp_path) == 1
    assert "training.safetensors is not a safetensors file" in capsys.readouterr().err


def test_folders_without_a_trained_ram_net_are_named(
    tmp_path: Path, command_line: Callable[..., int], capsys: pytest.CaptureFixture[str]
) -> None:
    assert command_line("recall-lengths", tmp_path, "--output", tmp_path / "out") == 1
    said = capsys.readouterr().err
    assert said.startswith(f"ramnet: {tmp_path} is neither a checkpoint nor") and said.count("\n") == 1
    assert not list(tmp_path.iterdir())
