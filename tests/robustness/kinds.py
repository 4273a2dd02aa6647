"""Kinds of input that ``fuzz`` changes: files, each made valid in a folder and used as a user does; and all kinds."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import torch

from ramnet import RamNetConfig, RamNetForCausalLM, RamState
from ramnet.training import Recipe, checkpoint, train
from ramnet.training.mqar import Mqar
from tests.robustness.calls import Ids, OpInputs, Prompts
from tests.robustness.fuzz import Case
from tests.robustness.models import PROMPT, SMALL, small_fast_model, small_model
from tests.samples import relative_rmse


class Config(Case):
    """``config.json``."""

    def make(self, folder: Path) -> None:
        SMALL.save(folder / "config.json")

    def use(self, folder: Path, changed: Any) -> None:
        config = RamNetConfig.load(folder / "config.json")
        assert RamNetConfig.model_validate_json(config.to_json()) == config
        with torch.device("meta"):
            RamNetForCausalLM(config)


class Checkpoint(Case):
    """What ``save_pretrained`` wrote."""

    def make(self, folder: Path) -> None:
        small_model().save_pretrained(folder)

    @torch.no_grad()
    def use(self, folder: Path, changed: Any) -> None:
        model = RamNetForCausalLM.from_pretrained(folder)
        logits = model(PROMPT % model.config.vocab_size).logits
        assert list(logits.shape) == [1, 5, model.config.vocab_size]
        pairs = zip(model.parameters(), small_model().parameters(), strict=False)
        if model.config == SMALL and all(torch.equal(a, b) for a, b in pairs):
            assert torch.equal(logits, small_model()(PROMPT).logits)


class QuickRecall(Mqar):
    """The task, evaluated on few examples."""

    def evaluate(self, model: RamNetForCausalLM) -> float:
        inputs, labels = self.batch(2, torch.Generator().manual_seed(0))
        return float((model(inputs).logits.argmax(-1) == labels).sum()) / 4


class Training(Case):
    """A run to resume."""

    task, recipe = QuickRecall(pairs=2, length=8, vocab_size=256), Recipe(steps=1, batch_size=2)

    def make(self, folder: Path) -> None:
        torch.manual_seed(0)
        train(RamNetForCausalLM(SMALL), self.task, self.recipe, output=folder)

    def use(self, folder: Path, changed: Any) -> None:
        progress = checkpoint.Progress.load(folder)
        if progress.config != SMALL:
            return  # another model, which is another kind of input
        torch.manual_seed(1)
        result = train(
            RamNetForCausalLM(progress.config), self.task, self.recipe.model_copy(update={"steps": 2}), output=folder,
            resume=True,
        )  # fmt: skip
        assert math.isfinite(result.metric)
        RamNetForCausalLM.from_pretrained(folder)


class State(Case):
    """A saved state, from which the kernels continue."""

    @torch.no_grad()
    def make(self, folder: Path) -> None:
        small_model()(PROMPT).state.save(folder / "session.safetensors")

    @torch.no_grad()
    def use(self, folder: Path, changed: Any) -> None:
        state, right = (RamState.load(folder / "session.safetensors") for _ in range(2))
        token = PROMPT[:, :1].expand(state.batch_size, 1)
        found = small_fast_model()(token, state, in_place=True).logits
        expected = small_model()(token, right, in_place=True).logits
        if expected.isfinite().all() and expected.abs().max() < 1e6:
            assert relative_rmse(found, expected) < 1e-4


class Records(Case):
    """A file of tuned records."""

    def make(self, folder: Path) -> None:
        from schedules.records import shipped_path

        lines = shipped_path("cpu").read_text().splitlines()[:3]
        (folder / "cpu.jsonl").write_text("\n".join(lines) + "\n")

    def use(self, folder: Path, changed: Any) -> None:
        from schedules import records
        from schedules.of_model import of_model

        known = records.load(folder / "cpu.jsonl")
        records.merge(folder / "cpu.jsonl", known)
        assert len(records.load(folder / "cpu.jsonl")) <= len(known)
        for workload in of_model(SMALL):
            for record in known:
                workload.distance(record.workload)


class Journal(Case):
    """Optuna's journal of a search."""

    def _study(self, folder: Path) -> Any:
        from autotune.study.study import Study
        from schedules.of_model import of_model

        study = Study(folder / "study.journal", of_model(SMALL)[3], "cpu", "a machine")
        study.begin()
        return study

    def make(self, folder: Path) -> None:
        study = self._study(folder)
        for _ in range(3):
            trial, _ = study.next()
            study.succeed(trial, 1.0)
        (folder / ".study.journal.lock").unlink(missing_ok=True)

    def use(self, folder: Path, changed: Any) -> None:
        found = self._study(folder).next()
        assert found is None or found[1].refusal is not None


class Export(Case):
    """An export to ONNX."""

    def make(self, folder: Path) -> None:
        from export.onnx.build import export_onnx

        export_onnx(small_model(), folder / "onnx")

    @torch.no_grad()
    def use(self, folder: Path, changed: Any) -> None:
        from export.onnx.session import OnnxSession

        found = OnnxSession(folder / "onnx", threads=1)(PROMPT).logits
        assert relative_rmse(found, small_model()(PROMPT).logits) < 1e-4


KINDS: dict[str, type[Case]] = {
    "config": Config, "checkpoint": Checkpoint, "training": Training, "state": State, "ids": Ids, "ops": OpInputs,
    "records": Records, "journal": Journal, "export": Export, "prompts": Prompts,
}  # fmt: skip
