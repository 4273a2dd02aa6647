"""Samples tell a right program from a wrong one, also where a model's addresses tie."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch

from export import samples
from export.margins import margins
from export.samples import Samples
from ramnet import ops
from tests.export.conftest import make_model


@torch.no_grad()
def test_samples_avoid_tokens_whose_addresses_tie() -> None:
    model = make_model("mixed", conv_layers=0, cape_half_layers=0)
    model.embedding.weight[:64] = 0  # all logits of their addresses are equal
    model.embedding.weight[64:96] *= 1e-9  # nearly equal
    made = Samples.of(model)
    assert made.ids.min() >= 96
    assert made.ids.shape == (samples.TOKENS,)
    ids = torch.from_numpy(made.ids.astype(np.int64))[None]
    assert made.error(model(ids).logits[0].numpy()) < 1e-6


def test_logits_of_zeros_are_met_by_zeros_only() -> None:
    made = Samples(np.zeros(2, np.int32), np.zeros((2, 3), np.float32))
    assert made.error(made.logits) == 0
    assert made.error(made.logits + 1e-3) == made.error(made.logits * np.nan) == math.inf


@torch.no_grad()
def test_the_margin_is_that_of_the_last_slot_that_is_chosen() -> None:
    p = torch.tensor([0.5, 0.3, 0.2])  # the weights of two sub-vectors: 0.25, 0.15 twice, 0.1 twice, 0.09, …
    logits = p.log().expand(2, 3)
    for top_k, margin in (
        (1, math.log(0.25 / 0.15)),
        (2, 0.0),
        (3, math.log(1.5)),
        (8, math.log(0.06 / 0.04)),
        (9, math.inf),
    ):
        with margins() as smallest:
            slots, weights = ops.address_decode(logits[None], top_k)
            assert abs(smallest() - margin) < 1e-5 or smallest() == margin
        plain = ops.address_decode(logits[None], top_k)
        assert torch.equal(slots, plain[0]) and torch.equal(weights, plain[1])


@torch.no_grad()
def test_a_model_whose_every_address_ties_has_samples_too(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(samples, "TOKENS", 2)
    model = make_model("mixed")
    for block in model.blocks:
        block.mixer.query_key_value.weight.zero_()
    assert np.isfinite(Samples.of(model).logits).all()
