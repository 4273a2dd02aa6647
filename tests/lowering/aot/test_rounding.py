"""Matrices are rounded to the nearest integers, with scales that fit them."""

from __future__ import annotations

import torch
from torch import Tensor

from lowering.aot import calibration, rounding, weights
from ramnet import RamNetConfig, RamNetForCausalLM


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


def test_calibrated_int4_changes_products_less_than_the_nearest_on_correlated_inputs() -> None:
    made = torch.Generator().manual_seed(0)
    weight = torch.randn(48, 96, generator=made)
    inputs = torch.randn(500, 24, generator=made) @ torch.randn(24, 96, generator=made)
    moments = inputs.T @ inputs

    def error(packed: Tensor, scale: Tensor) -> float:
        return float((inputs @ (unpacked(packed, scale).flatten(1) - weight).T).square().mean())

    assert error(*rounding.int4(weight, moments)) < 0.3 * error(*rounding.int4(weight))


def test_calibration_keeps_what_int4_represents_and_inputs_that_are_never_used() -> None:
    exact = torch.arange(-8, 8).repeat(2, 4).float() * torch.tensor([[0.5], [-3.0]])
    assert torch.equal(unpacked(*rounding.int4(exact, torch.ones(64, 64))).flatten(1), exact)
    weight = torch.randn(4, 64, generator=torch.Generator().manual_seed(0))
    nearest = rounding.int4(weight)
    for moments in (torch.zeros(64, 64), torch.full((64, 64), torch.nan)):
        assert all(map(torch.equal, rounding.int4(weight, moments), nearest))


def test_moments_are_those_of_each_products_inputs() -> None:
    model = RamNetForCausalLM(RamNetConfig.preset("tiny")).eval()
    ids = torch.arange(40).view(2, 20)  # two windows
    found = calibration.moments(model, list(ids))
    matrices = {each.name for each in weights.of_model(model.config) if each.is_matrix}
    assert found.keys() == matrices - {"embedding.weight"}
    with torch.no_grad():
        x = model.hidden_states(ids)[0]
    assert torch.allclose(found["head.weight"], torch.einsum("btc,btd->cd", x, x), rtol=1e-3, atol=1e-3)


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
