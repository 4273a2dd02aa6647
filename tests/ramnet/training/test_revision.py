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
MODELS: dict[str, Config] = {
    "recall RAM-Net": recall.ram_net(16, 2).model_copy(update=SMALL),
    **{
        f"recall {name}": recall.baseline(name, 8, window=4 if name == "window" else None).model_copy(update=SMALL)
        for name in get_args(Name)
    },
    **{f"lm {name}": of for name, of in lm.configurations(replace(lm.SCALES["quick"], hidden_size=32)).items()},
}
# The loss of the eighth step, in nats per label.
LOSSES = {
    "recall RAM-Net": 3.36017,
    "recall linear": 3.52044,
    "recall gla": 3.50470,
    "recall deltanet": 3.57152,
    "recall gated_deltanet": 3.53348,
    "recall mamba2": 3.50449,
    "recall rwkv7": 3.54221,
    "recall attention": 3.51571,
    "recall window": 3.52108,
    "lm RAM-Net": 5.50616,
    "lm Transformer++": 4.82081,
    "lm GLA": 5.46470,
    "lm Gated DeltaNet": 5.44760,
    "lm RAM-Net + convolutions": 5.28439,
    "lm Transformer++ + convolutions": 5.21907,
    "lm GLA + convolutions": 5.45173,
    "lm Gated DeltaNet + convolutions": 5.80251,
}


@pytest.mark.parametrize("name", MODELS)
def test_outcomes_of_this_revision_can_be_made_again(name: str) -> None:
    torch.manual_seed(0)
    recipe = Recipe(steps=8, batch_size=4, learning_rate=1e-2, warmup_steps=2)
    with ops.using("reference"):
        loss = train(make(MODELS[name]), Mqar(2, 16, 32), recipe).losses[-1]
    assert loss == pytest.approx(LOSSES[name], abs=1e-4), (
        f"training has changed: raise REVISION in ramnet/training/sweep.py, now {REVISION}, and write the losses anew"
    )


def test_every_loss_is_of_a_model_of_the_experiments() -> None:
    assert LOSSES.keys() == MODELS.keys()
