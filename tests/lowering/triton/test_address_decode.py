"""address_decode and its backward in Triton against the whole product softmax of M entries."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from lowering.triton import address_decode, address_decode_backward
from schedules.gpu.address import AddressDecode, AddressDecodeBackward
from tests.brute_force import product_softmax
from tests.samples import TOLERANCE, relative_rmse

# (U, P, K): K no power of two, K = 1, K = M, P = 1, 3, 5, more digits than slots kept and fewer.
SIZES = [(1, 5, 5), (1, 37, 6), (2, 3, 9), (3, 1, 1), (3, 5, 1), (3, 3, 7), (4, 2, 16), (5, 4, 8)]


def random_logits(*shape: int, dtype: torch.dtype = torch.float32, seed: int = 0) -> Tensor:
    return (3 * torch.randn(shape, generator=torch.Generator().manual_seed(seed))).to(dtype)


def decode(logits: Tensor, top_k: int, warp: int, unroll: int) -> tuple[Tensor, Tensor]:
    slots, weights = address_decode.plan(logits, top_k, AddressDecode(threads=64, unroll=unroll)).run(warp)
    assert slots.dtype == torch.int32 and weights.dtype == logits.dtype
    assert slots.shape == weights.shape == (len(logits), top_k)
    return slots, weights


def check(logits: Tensor, top_k: int, warp: int, unroll: int = 1) -> None:
    """Slots, weights and the gradient; where entries tie, only the weights are determined."""
    tolerance = TOLERANCE[logits.dtype]
    slots, weights = decode(logits, top_k, warp, unroll)
    exact = logits.cpu().double().requires_grad_()
    full = product_softmax(exact)
    assert relative_rmse(weights.cpu(), full.topk(top_k, dim=-1).values) <= tolerance
    assert bool((weights[..., 1:] <= weights[..., :-1]).all()), "weights must descend"
    ordered = slots.sort(dim=-1).values
    assert bool((ordered[..., 1:] > ordered[..., :-1]).all()), "slots must be distinct"
    picked = full.gather(-1, slots.cpu().long())
    assert relative_rmse(weights.cpu(), picked) <= tolerance

    cotangent = random_logits(*weights.shape, dtype=logits.dtype, seed=1)
    plan = address_decode_backward.plan(
        cotangent.to(logits.device), logits, slots, weights, AddressDecodeBackward(threads=64)
    )
    (grad,) = plan.run(warp)
    (expected,) = torch.autograd.grad(picked, exact, cotangent.double())
    assert grad.dtype == logits.dtype
    # A weight's gradient is a difference of two near numbers times the weight, rounded before: hence the factor.
    assert relative_rmse(grad.cpu(), expected) <= 4 * tolerance


@pytest.mark.parametrize("unroll", [0, 1, 2])
@pytest.mark.parametrize(("order", "sub_dim", "top_k"), SIZES)
def test_equals_the_full_product_softmax(
    device: str, warp: int, order: int, sub_dim: int, top_k: int, unroll: int
) -> None:
    check(random_logits(67, order, sub_dim).to(device), top_k, warp, unroll)
