"""address_decode against the whole product softmax of M entries."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from ramnet import ops
from tests.brute_force import product_softmax
from tests.samples import TOLERANCE, relative_rmse, strided

# (U, P, K): every U from 1 to 6, every P from 1 to 5, K from 1 to M. A kernel is compiled for each.
SIZES = [(3, 1, 1), (1, 5, 5), (2, 3, 9), (3, 5, 1), (4, 2, 16), (4, 4, 7), (5, 4, 8), (6, 2, 3)]


def random_logits(*shape: int, dtype: torch.dtype = torch.float32, seed: int = 0) -> Tensor:
    return (3 * torch.randn(shape, generator=torch.Generator().manual_seed(seed))).to(dtype)


def check(logits: Tensor, top_k: int) -> None:
    """Check slots, weights and the gradient; slots of equal weights are undetermined."""
    tolerance = TOLERANCE[logits.dtype]
    logits = logits.detach().requires_grad_()
    slots, weights = ops.address_decode(logits, top_k)
    assert slots.dtype == torch.int32 and weights.dtype == logits.dtype
    assert slots.shape == weights.shape == (*logits.shape[:-2], top_k)

    exact = logits.detach().double().requires_grad_()
    full = product_softmax(exact)
    assert relative_rmse(weights, full.topk(top_k, dim=-1).values) <= tolerance
    assert bool((weights[..., 1:] <= weights[..., :-1]).all()), "weights must descend"
    ordered = slots.sort(dim=-1).values
    assert bool((ordered[..., 1:] > ordered[..., :-1]).all()), "slots must be distinct"
    picked = full.gather(-1, slots.long())
    assert relative_rmse(weights, picked) <= tolerance

    cotangent = random_logits(*weights.shape, dtype=logits.dtype, seed=1)
    (grad,) = torch.autograd.grad(weights, logits, cotangent)
    (expected,) = torch.autograd.grad(picked, exact, cotangent.double())
    assert grad.dtype == logits.dtype
    # The factor is for cancellation: the gradient is the rounded weight times a difference of two close numbers.
    assert relative_rmse(grad, expected) <= 4 * tolerance


@pytest.mark.parametrize(("order", "sub_dim", "top_k"), SIZES)
def test_equals_the_full_product_softmax(kernels: str, order: int, sub_dim: int, top_k: int) -> None:
    for leading in [(1,), (63,), (2, 7, 3)]:
        check(random_logits(*leading, order, sub_dim), top_k)


def test_more_slots_than_fit_in_memory(kernels: str) -> None:
    """M = 4^15: each weight is the product of its digits' probabilities, and the first is that of the best digits."""
    logits = random_logits(7, 15, 4)
    slots, weights = ops.address_decode(logits, 8)
    digits = slots.long().unsqueeze(-1) // 4 ** torch.arange(15) % 4  # [7, 8, 15]
    probability = logits.double().softmax(-1).unsqueeze(1).expand(7, 8, 15, 4)
    assert relative_rmse(weights, probability.gather(-1, digits.unsqueeze(-1)).squeeze(-1).prod(-1)) <= 1e-5
    assert torch.equal(digits[:, 0], logits.argmax(-1))
    assert int(slots.min()) >= 0 and bool((weights[:, 1:] <= weights[:, :-1]).all())


@pytest.mark.parametrize(
    ("dtype", "order", "sub_dim", "top_k"),
    [(torch.float64, 3, 5, 6), (torch.bfloat16, 5, 4, 8), (torch.float16, 3, 5, 6)],
)
def test_every_type(kernels: str, dtype: torch.dtype, order: int, sub_dim: int, top_k: int) -> None:
    check(random_logits(1000, order, sub_dim, dtype=dtype), top_k)


def test_no_tokens(kernels: str) -> None:
    logits = torch.zeros(2, 0, 5, 4, requires_grad=True)
    slots, weights = ops.address_decode(logits, 8)
    assert slots.shape == weights.shape == (2, 0, 8)
    assert torch.autograd.grad(weights.sum(), logits)[0].shape == logits.shape


def test_logits_need_no_leading_axis(kernels: str) -> None:
    check(random_logits(5, 4), 8)


def test_logits_need_not_be_contiguous(kernels: str) -> None:
    check(strided(random_logits(7, 3, 5, 4)), 8)


def test_a_gradient_of_stride_zero(kernels: str) -> None:
    logits = random_logits(63, 5, 4).requires_grad_()
    slots, weights = ops.address_decode(logits, 8)
    (grad,) = torch.autograd.grad(weights.sum(), logits)
    exact = logits.detach().double().requires_grad_()
    (expected,) = torch.autograd.grad(product_softmax(exact).gather(-1, slots.long()).sum(), exact)
    assert relative_rmse(grad, expected) <= 4e-5


def test_ties_give_distinct_slots_and_the_right_weights(kernels: str) -> None:
    for logits in (torch.zeros(7, 5, 4), random_logits(63, 5, 4).round()):
        check(logits, 8)


def test_the_first_sub_vector_is_the_least_significant_digit(kernels: str) -> None:
    logits = torch.zeros(5, 4)
    for u, digit in enumerate([3, 1, 0, 2, 1]):
        logits[u, digit] = 50.0
    slots, _ = ops.address_decode(logits, 8)
    assert int(slots[0]) == 3 + 1 * 4 + 0 * 16 + 2 * 64 + 1 * 256


def test_a_saturated_softmax_gives_exactly_one_and_never_more(kernels: str) -> None:
    """A write weight above 1 would make the decay (1 − w)^γ NaN."""
    sure = torch.full((5, 4), -200.0)
    sure[:, 2] = 200.0
    _, weights = ops.address_decode(sure, 8)
    # A kernel's exp may return float32's smallest normal number, 1.2e-38, instead of 0.
    assert weights[0] == 1 and float(weights[1:].max()) <= 1e-37
    steep = 20 * random_logits(1000, 5, 4)
    _, weights = ops.address_decode(steep, 8)
    assert float(weights.max()) <= 1 and float(weights.min()) >= 0


def test_a_logit_of_minus_infinity_rules_its_digit_out(kernels: str) -> None:
    logits = random_logits(63, 3, 4)
    logits[..., 1, 2] = -torch.inf
    slots, weights = ops.address_decode(logits, 8)
    assert relative_rmse(weights, product_softmax(logits).topk(8, dim=-1).values) <= 1e-5
    assert bool((slots // 4 % 4 != 2).all())
