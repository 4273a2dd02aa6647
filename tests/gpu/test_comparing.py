"""The experiments that compare models train and score them on this machine's GPU."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from ramnet.baselines.model import MIXERS
from ramnet.files import write_text_atomic
from ramnet.lm.task import Compared
from ramnet.recall.plan import baseline, ram_net
from ramnet.training.model import Config
from ramnet.training.mqar import Mix, Mqar
from ramnet.training.recipe import Recipe
from ramnet.training.sweep import Outcome, Run, ScoredTask, _train

RECALL = Mix((Mqar(2, 16), Mqar(4, 32)), (Mqar(2, 16), Mqar(4, 32)))
MODELS = {"RAM-Net": ram_net(16, 2), **{name: baseline(name, 16, 8 if name == "window" else None) for name in MIXERS}}


def trained(config: Config, task: ScoredTask, folder: Path, kernels: str) -> Outcome:
    run = Run("a model", config, Recipe(steps=4, batch_size=4, learning_rate=1e-3), task, scored=True)
    before = torch.cuda.memory_stats()["allocation.all.allocated"]
    outcome = _train(run, folder, kernels)
    assert torch.cuda.memory_stats()["allocation.all.allocated"] > before
    return outcome


@pytest.mark.parametrize("name", MODELS)
def test_recall_is_trained_and_scored(name: str, tmp_path: Path, target: str) -> None:
    found, expected = (trained(MODELS[name], RECALL, tmp_path / kernels, kernels) for kernels in ("gpu", "reference"))
    assert found.loss == pytest.approx(expected.loss, rel=1e-4)
    assert found.scores == pytest.approx(expected.scores, abs=2e-3)


def test_a_language_model_is_trained_and_scored(tmp_path: Path, target: str) -> None:
    files = [str(tmp_path / f"{i}.txt") for i in range(20)]
    for file in files:
        write_text_atomic(Path(file), "the name and the name, of another name\n" * 20)
    task = Compared(files, 128, (64, 128, 256))
    config = ram_net(16, 2).model_copy(update={"vocab_size": 256})
    found, expected = (trained(config, task, tmp_path / kernels, kernels) for kernels in ("gpu", "reference"))
    assert found.scores == pytest.approx(expected.scores, rel=1e-3)
