"""A configuration of the experiments trains as it did when the revision of their outcomes was last raised."""

from __future__ import annotations

from dataclasses import replace
from typing import get_args

import pytest
import torch

from ramnet import ops
from ramnet.baselines.model import Name
from ramnet.lm import plan as lm
from ramnet.recall import plan as recall
from ramnet.training.loop import train
from ramnet.training.model import Config, make
from ramnet.training.mqar import Mqar
from ramnet.training.recipe import Recipe
from ramnet.training.sweep import REVISION

SMALL = {"vocab_size": 32, "hidden_size": 16}
RECALL = {
    "RAM-Net": recall.ram_net(16, 2).model_copy(update=SMALL),
    **{
        name: recall.baseline(name, 8, window=4 if name == "window" else None).model_copy(update=SMALL)
        for name in get_args(Name)
    },
}
LM = lm.configurations(replace(lm.SCALES["quick"], hidden_size=32))
# The loss of the eighth step, in nats per label.
RECALL_LOSSES = {
    "RAM-Net": 3.36017,
    "linear": 3.52044,
    "gla": 3.50470,
    "deltanet": 3.57152,
    "gated_deltanet": 3.53348,
    "mamba2": 3.50449,
    "rwkv7": 3.54221,
    "attention": 3.51571,
    "window": 3.52108,
}
LM_LOSSES = {
    "RAM-Net": 5.50616,
    "Transformer++": 4.82081,
    "GLA": 5.46470,
    "Gated DeltaNet": 5.44760,
    "RAM-Net + convolutions": 5.28439,
    "Transformer++ + convolutions": 5.21907,
    "GLA + convolutions": 5.45173,
    "Gated DeltaNet + convolutions": 5.80251,
}


def last_loss(config: Config) -> float:
    torch.manual_seed(0)
    recipe = Recipe(steps=8, batch_size=4, learning_rate=1e-2, warmup_steps=2)
    with ops.using("reference"):
        return train(make(config), Mqar(2, 16, 32), recipe).losses[-1]


@pytest.mark.parametrize(
    ("config", "loss"),
    [
        *(pytest.param(RECALL[name], loss, id=f"recall {name}") for name, loss in RECALL_LOSSES.items()),
        *(pytest.param(LM[name], loss, id=f"lm {name}") for name, loss in LM_LOSSES.items()),
    ],
)
def test_outcomes_of_this_revision_can_be_made_again(config: Config, loss: float) -> None:
    assert last_loss(config) == pytest.approx(loss, abs=1e-4), (
        f"training has changed: raise REVISION in ramnet/training/sweep.py, now {REVISION}, and write the losses anew"
    )


def test_every_model_of_the_experiments_is_trained() -> None:
    assert RECALL_LOSSES.keys() == RECALL.keys() and LM_LOSSES.keys() == LM.keys()
