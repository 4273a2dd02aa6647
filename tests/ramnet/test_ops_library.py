"""The ops in torch: opcheck, torch.compile in one graph, backends."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.autograd import forward_ad

from ramnet import ops
from tests.samples import DIFFERENTIABLE, relative_rmse, scan_inputs, step_inputs

LOGITS = torch.randn(2, 7, 3, 3, generator=torch.Generator().manual_seed(0))


def scan_leaves(tokens: int = 7) -> dict[str, Tensor]:
    return {
        name: x.requires_grad_(name in DIFFERENTIABLE) for name, x in scan_inputs(1, 3, tokens, 4, 27, 5).items()
    }  # fmt: skip


def backward_arguments(dtype: torch.dtype) -> dict[str, tuple[Any, ...]]:
    """The arguments that autograd passes to the backward ops."""
    logits = LOGITS.to(dtype)
    slots, weights = ops.address_decode(logits, 4)
    inputs = scan_inputs(1, 3, 7, 4, 27, 5, dtype=dtype)
    like = (inputs["values"], inputs["memory"], inputs["mass"])
    return {
        "address_decode_backward": (torch.ones_like(weights), logits, slots, weights),
        "memory_scan_backward": (*map(torch.ones_like, like), *inputs.values(), 0.5, 1e-6, 0.01),
    }


def test_opcheck_address_decode(kernels: str) -> None:
    op = torch.ops.ramnet.address_decode.default
    torch.library.opcheck(op, (LOGITS.clone().requires_grad_(), 4, kernels))
    torch.library.opcheck(op, (LOGITS.half(), 4, kernels))


def test_opcheck_memory_scan(kernels: str) -> None:
    op = torch.ops.ramnet.memory_scan.default
    torch.library.opcheck(op, tuple(scan_leaves().values()), {"decay_power": 0.5, "kernels": kernels})
    torch.library.opcheck(op, tuple(scan_inputs(1, 3, 7, 4, 27, 5, dtype=torch.bfloat16).values()))


def test_opcheck_memory_step(kernels: str) -> None:
    step = step_inputs(scan_inputs(1, 3, 1, 4, 27, 5), 0)
    torch.library.opcheck(torch.ops.ramnet.memory_step.default, tuple(step.values()), {"kernels": kernels})


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", ["address_decode_backward", "memory_scan_backward"])
def test_opcheck_backward(kernels: str, name: str, dtype: torch.dtype) -> None:
    """Also checks the results' dtypes, which autograd would convert silently."""
    op = getattr(torch.ops.ramnet, name).default
    torch.library.opcheck(op, backward_arguments(dtype)[name], {"kernels": kernels})


def compiled(function: Callable[..., Any]) -> Callable[..., Any]:
    """aot_eager traces forward and backward as every backend would, and generates no code."""
    torch.compiler.reset()
    return torch.compile(function, fullgraph=True, backend="aot_eager")


def test_compiles_address_decode_in_one_graph(kernels: str) -> None:
    logits = LOGITS.clone().requires_grad_()
    _, weights = compiled(ops.address_decode)(logits, 4)
    _, expected = ops.address_decode(logits, 4)
    assert torch.equal(weights, expected)
    (grad,), (right,) = (torch.autograd.grad(x.square().sum(), logits) for x in (weights, expected))
    assert torch.equal(grad, right)


def test_compiles_memory_scan_in_one_graph(kernels: str) -> None:
    inputs = scan_leaves()
    leaves = [inputs[name] for name in DIFFERENTIABLE]
    results, expected = compiled(ops.memory_scan)(**inputs, decay_power=0.5), ops.memory_scan(**inputs, decay_power=0.5)
    for actual, right in zip(results, expected, strict=True):
        assert torch.equal(actual, right)
    grads, right_grads = (torch.autograd.grad(sum(x.sum() for x in group), leaves) for group in (results, expected))
    for name, grad, right in zip(DIFFERENTIABLE, grads, right_grads, strict=True):
        assert relative_rmse(grad, right) <= 1e-6, name


def test_a_compiled_scan_takes_any_length(kernels: str) -> None:
    """T is dynamic: other lengths cause at most one more compilation."""
    torch.compiler.reset()
    run = torch.compile(ops.memory_scan, fullgraph=True, backend="aot_eager", dynamic=True)
    for tokens in (7, 63, 2):
        inputs = scan_inputs(1, 3, tokens, 4, 27, 5)
        assert torch.equal(run(**inputs)[0], ops.memory_scan(**inputs)[0])


def test_compiles_memory_step_in_one_graph_and_still_in_place(kernels: str) -> None:
    inputs = scan_inputs(1, 3, 1, 4, 27, 5)
    step, right = step_inputs(inputs, 0), step_inputs(inputs, 0)
    assert torch.equal(compiled(ops.memory_step)(**step), ops.memory_step(**right))
    assert torch.equal(step["memory"], right["memory"]) and torch.equal(step["mass"], right["mass"])


def test_the_reference_has_a_name_for_command_lines() -> None:
    with ops.using("cpu"), ops.using("reference"):
        assert ops.active() == ""


def test_an_unknown_backend_is_refused_where_it_is_named() -> None:
    with pytest.raises(ValueError, match=r"backend 'gpu9' is unknown; there are .*cpu"), ops.using("gpu9"):
        pass


class Recorder:
    """A backend that records its ops and runs them on the reference."""

    def __init__(self) -> None:
        self.calls: list[str] = []

    def __getattr__(self, name: str) -> Callable[..., Any]:
        from ramnet.ops import reference

        self.calls.append(name)
        return getattr(reference, name)


def test_a_backward_pass_stays_on_the_backend_of_its_forward() -> None:
    recorder = Recorder()
    ops.register_backend("recorder", recorder)
    inputs = scan_leaves()
    with ops.using("recorder"):
        output, *_ = ops.memory_scan(**inputs)
        _, weights = ops.address_decode(LOGITS.clone().requires_grad_(), 4)
    assert recorder.calls == ["memory_scan", "address_decode"]
    (output.sum() + weights.sum()).backward()
    assert set(recorder.calls[2:]) == {"memory_scan_backward", "address_decode_backward"}


def test_a_backend_is_left_when_its_block_is_even_by_an_error() -> None:
    recorder = Recorder()
    ops.register_backend("recorder", recorder)
    with pytest.raises(ZeroDivisionError), ops.using("recorder"):
        raise ZeroDivisionError
    ops.address_decode(LOGITS, 4)
    assert recorder.calls == []


@pytest.mark.parametrize("differentiate", ["jvp", "dual numbers"])
def test_derivatives_in_forward_mode_are_refused(kernels: str, differentiate: str) -> None:
    """The ops would drop the tangents, and the derivative would be 0."""
    inputs = scan_inputs(1, 2, 3, 4, 27, 5)
    values = inputs.pop("values")
    for call, x in (
        (lambda x: ops.address_decode(x, 2)[1], torch.randn(3, 2, 4)),
        (lambda x: ops.memory_scan(**inputs, values=x)[0], values),
    ):
        with pytest.raises(NotImplementedError, match=r"^the memory ops have no forward-mode derivative"):
            if differentiate == "jvp":
                torch.func.jvp(call, (x,), (torch.ones_like(x),))
            else:
                with forward_ad.dual_level():
                    call(forward_ad.make_dual(x, torch.ones_like(x)))
        with forward_ad.dual_level():
            call(x)  # a plain tensor meanwhile
