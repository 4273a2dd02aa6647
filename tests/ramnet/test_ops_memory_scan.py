"""memory_scan and its gradients against the dense recurrence over all M slots."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from ramnet import ops
from tests import brute_force
from tests.samples import DIFFERENTIABLE, TOLERANCE, relative_rmse, scan_inputs, strided

# (B, H, T, K, M, D, γ). 150 tokens are more than two of the CPU kernels' chunks. Few K, M, D and γ, as a kernel is
# compiled for each.
SIZES = [
    (1, 1, 1, 1, 1, 1, 1.0),
    (1, 3, 7, 3, 25, 5, 1.0),
    (3, 1, 150, 3, 25, 5, 1.0),
    (1, 1, 63, 8, 64, 33, 0.0),
    (3, 1, 150, 8, 64, 33, 0.0),
    (2, 2, 63, 8, 32, 64, 1.0),
    (1, 1, 63, 1, 27, 24, 1.7),
    (1, 3, 7, 16, 16, 1, 2.0),
    (1, 3, 63, 16, 16, 1, 2.0),
    (1, 1, 7, 2, 70_001, 1, 1.0),
]


def gradients(results: tuple[Tensor, ...], inputs: dict[str, Tensor], cotangents: list[Tensor]) -> tuple[Tensor, ...]:
    """The gradients of every differentiable input, with a cotangent for output, memory and mass."""
    wanted = [inputs[name] for name in DIFFERENTIABLE]
    return torch.autograd.grad(results, wanted, cotangents, materialize_grads=True)


def check(inputs: dict[str, Tensor], **settings: Any) -> None:
    """Output, new state and every gradient, through the output and the new state alike."""
    inputs = {name: x.detach().requires_grad_(name in DIFFERENTIABLE) for name, x in inputs.items()}
    before = {name: x.detach().clone() for name, x in inputs.items()}
    results = ops.memory_scan(**inputs, **settings)
    dense = {name: x.detach().double().requires_grad_() if name in DIFFERENTIABLE else x for name, x in inputs.items()}
    expected = brute_force.memory_scan(dense, **settings)

    like = (inputs["values"], inputs["memory"], inputs["mass"])
    for name, actual, right, same in zip(("output", "memory", "mass"), results, expected, like, strict=True):
        assert actual.dtype == same.dtype, name
        error = relative_rmse(actual, right)
        assert error <= TOLERANCE[actual.dtype], f"{name}: relative RMSE {error:.1e}"

    generator = torch.Generator().manual_seed(1)
    cotangents = [torch.randn(x.shape, generator=generator).to(x.dtype) for x in like]
    actual_grads = gradients(results, inputs, cotangents)
    right_grads = gradients(expected, dense, [x.double() for x in cotangents])
    for name, actual, right in zip(DIFFERENTIABLE, actual_grads, right_grads, strict=True):
        assert actual.dtype == inputs[name].dtype, name
        error = relative_rmse(actual, right)
        assert error <= 2 * TOLERANCE[actual.dtype], f"gradient of {name}: relative RMSE {error:.1e}"
    for name, x in inputs.items():
        assert torch.equal(x, before[name]), f"{name} was changed"


@pytest.mark.parametrize(("batch", "heads", "tokens", "top_k", "num_slots", "value_dim", "power"), SIZES)
def test_equals_the_dense_recurrence(
    kernels: str, batch: int, heads: int, tokens: int, top_k: int, num_slots: int, value_dim: int, power: float
) -> None:
    check(scan_inputs(batch, heads, tokens, top_k, num_slots, value_dim), decay_power=power)


@pytest.mark.parametrize(
    ("dtype", "power"), [(torch.float64, 1.0), (torch.float64, 0.5), (torch.bfloat16, 0.5), (torch.float16, 1.0)]
)
def test_every_type(kernels: str, dtype: torch.dtype, power: float) -> None:
    check(scan_inputs(1, 3, 63, 4, 27, 24, dtype=dtype), decay_power=power)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_a_float32_state_with_half_precision_activations(kernels: str, dtype: torch.dtype) -> None:
    check(scan_inputs(1, 3, 63, 4, 27, 24, dtype=dtype, state_dtype=torch.float32))


@pytest.mark.parametrize("power", [0.0, 0.5, 1.0, 2.0])
def test_write_weights_of_exactly_one_and_zero(kernels: str, power: float) -> None:
    """The derivative of (1 − w)^γ is infinite at 1 for γ < 1 and zero for γ > 1; the proxy's is neither."""
    check(scan_inputs(1, 3, 63, 4, 27, 24, access="saturated"), decay_power=power)


@pytest.mark.parametrize("power", [0.5, 2.0])
def test_the_proxy_gradient_at_one_is_the_stated_number(kernels: str, power: float) -> None:
    """One write of w = 1 on a slot that holds z: ∂z'/∂w = 1 − γ(1 − ε')ε'^(γ−1) z."""
    inputs = scan_inputs(1, 1, 1, 4, 27, 24)
    inputs["write_weights"] = torch.ones(1, 1, 1, 4, requires_grad=True)
    _, _, mass = ops.memory_scan(**inputs, decay_power=power, proxy_eps=0.01)
    (grad,) = torch.autograd.grad(mass.sum(), inputs["write_weights"])
    z = inputs["mass"].gather(-1, inputs["write_slots"][0].long())
    torch.testing.assert_close(grad[0], 1 - power * 0.99 * 0.01 ** (power - 1) * z, rtol=1e-5, atol=0)


@pytest.mark.parametrize("power", [0.0, 1.0])
def test_frequent_slots(kernels: str, power: float) -> None:
    check(scan_inputs(1, 3, 150, 4, 27, 24, access="hot"), decay_power=power)


def test_other_eps(kernels: str) -> None:
    check(scan_inputs(1, 3, 63, 4, 27, 24), decay_power=0.5, eps=0.3, proxy_eps=0.2)


def test_no_tokens_leave_the_state_as_it_was(kernels: str) -> None:
    inputs = scan_inputs(1, 3, 0, 4, 27, 24)
    output, memory, mass = ops.memory_scan(**inputs)
    assert output.shape == (1, 3, 0, 24)
    assert torch.equal(memory, inputs["memory"]) and torch.equal(mass, inputs["mass"])
    check(inputs)


def test_inputs_need_not_be_contiguous(kernels: str) -> None:
    check({name: strided(x) for name, x in scan_inputs(2, 3, 63, 4, 27, 24).items()})


def test_the_number_of_threads_changes_nothing(kernels: str) -> None:
    before = torch.get_num_threads()
    try:
        for threads in (1, 2, 3):
            torch.set_num_threads(threads)
            check(scan_inputs(2, 3, 63, 4, 27, 24))
    finally:
        torch.set_num_threads(before)


@pytest.mark.parametrize("used", [0, 1, 2], ids=["output", "memory", "mass"])
def test_a_loss_through_one_result_alone(kernels: str, used: int) -> None:
    """Includes a gradient of stride 0, as ``sum`` gives."""
    inputs = {
        name: x.requires_grad_(name in DIFFERENTIABLE) for name, x in scan_inputs(1, 3, 63, 4, 27, 24).items()
    }  # fmt: skip
    dense = {name: x.detach().double().requires_grad_() if name in DIFFERENTIABLE else x for name, x in inputs.items()}
    actual = torch.autograd.grad(
        ops.memory_scan(**inputs)[used].sum(), [inputs[name] for name in DIFFERENTIABLE], materialize_grads=True
    )
    expected = torch.autograd.grad(
        brute_force.memory_scan(dense)[used].sum(), [dense[name] for name in DIFFERENTIABLE], materialize_grads=True
    )
    for name, grad, right in zip(DIFFERENTIABLE, actual, expected, strict=True):
        assert relative_rmse(grad, right) <= 2e-5, name


@pytest.mark.parametrize("name", DIFFERENTIABLE)
def test_one_input_alone_may_need_a_gradient(kernels: str, name: str) -> None:
    inputs = scan_inputs(1, 3, 7, 4, 27, 24)
    inputs[name].requires_grad_()
    (grad,) = torch.autograd.grad(ops.memory_scan(**inputs)[0].sum(), inputs[name])
    every = {other: x.detach().requires_grad_(other in DIFFERENTIABLE) for other, x in inputs.items()}
    (expected,) = torch.autograd.grad(ops.memory_scan(**every)[0].sum(), every[name])
    assert torch.equal(grad, expected) and float(grad.norm()) > 0


@pytest.mark.parametrize("power", [0.5, 1.0, 2.0])
def test_finite_differences_agree_where_the_proxy_is_the_true_decay(kernels: str, power: float) -> None:
    inputs = scan_inputs(1, 2, 5, 2, 4, 3, dtype=torch.float64)
    inputs["write_weights"] = 0.9 * inputs["write_weights"]
    tensors = [x.requires_grad_(name in DIFFERENTIABLE) for name, x in inputs.items()]
    assert torch.autograd.gradcheck(lambda *x: ops.memory_scan(*x, power, 1e-6, 1e-12), tensors)
