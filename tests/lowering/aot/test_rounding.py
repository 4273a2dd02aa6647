"""Matrices are rounded to the nearest integers, with scales that fit them."""

from __future__ import annotations

import torch
from torch import Tensor

from lowering.aot import rounding, weights
from ramnet import RamNetConfig


def unpacked(packed: Tensor, scale: Tensor) -> Tensor:
    """Return the numbers [outputs, groups, 32] that int4 stands for."""
    return rounding.unpacked(packed).unflatten(1, (-1, 32)) * scale.float().unsqueeze(2)


def test_int4_is_better_than_the_largest_magnitude_at_7() -> None:
    weight = torch.randn(64, 128, generator=torch.Generator().manual_seed(0))
    groups = weight.unflatten(1, (-1, 32))
    step = groups.abs().amax(2, keepdim=True) / 7
    plain = (groups / step).round() * step
    found = unpacked(*rounding.int4(weight))
    assert (found - groups).square().mean() < 0.8 * (plain - groups).square().mean()
    assert ((found - groups).abs().amax(2) < 1.01 * step.squeeze(2)).all()


def test_what_int4_represents_is_kept_exactly() -> None:
    weight = torch.arange(-8, 8).repeat(2, 4).float() * torch.tensor([[0.5], [-3.0]])
    assert torch.equal(unpacked(*rounding.int4(weight)).flatten(1), weight)


def test_zeros_stay_zero_and_nan_stays_nan_in_its_group() -> None:
    weight = torch.zeros(2, 64)
    weight[0, 40], weight[1, 3] = torch.nan, torch.inf
    found = unpacked(*rounding.int4(weight))
    assert found[0, 1].isnan().all() and not found[1, 0].isfinite().any()
    assert (found[0, 0] == 0).all() and (found[1, 1] == 0).all()


def test_the_embedding_of_an_int4_model_is_int8() -> None:
    for tied in (False, True):
        config = RamNetConfig.preset("tiny", tie_embeddings=tied)
        kinds = {name: kind for name, kind, _ in weights.table(config, "int4") if kind != "F32"}
        assert kinds.pop("embedding.weight") == "I8"
        assert set(kinds.values()) == {"U8", "BF16"}
