"""The whole model as one graph of torch.compile: forward and training, whatever the length."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch._dynamo.testing import CompileCounterWithBackend

from ramnet import RamNetConfig, RamNetForCausalLM, RamState
from tests.samples import relative_rmse

# An op is one node of a graph, whatever computes it; ``tests/ramnet/test_model.py`` also compiles the reference.
pytestmark = pytest.mark.parametrize("kernels", ["cpu"], indirect=True)

# One static length, then any length.
STATIC_AND_DYNAMIC = 2
LENGTHS = (5, 9, 33)


def small_model(**changes: Any) -> RamNetForCausalLM:
    torch.manual_seed(0)
    config = RamNetConfig(
        vocab_size=61, hidden_size=16, num_layers=1, num_heads=2, value_dim=12, order=3, sub_dim=3, top_k=4,
        cape_half_layers=1, intermediate_size=24, conv_layers=1, decay_power=2.0,
    )  # fmt: skip
    return RamNetForCausalLM(RamNetConfig(**{**config.model_dump(), **changes}))


def ids(batch: int, tokens: int) -> Tensor:
    return torch.randint(0, 61, (batch, tokens), generator=torch.Generator().manual_seed(1))


def one_graph(function: Callable[..., Any], backend: str = "aot_eager") -> tuple[Any, CompileCounterWithBackend]:
    """Compile ``function`` without graph breaks and count its graphs; aot_eager generates no code."""
    torch.compiler.reset()
    counter = CompileCounterWithBackend(backend)
    return torch.compile(function, fullgraph=True, backend=counter), counter


def assert_states_match(actual: RamState, expected: RamState) -> None:
    theirs = expected.tensors()
    for name, tensor in actual.tensors().items():
        assert relative_rmse(tensor, theirs[name]) < 1e-5, name


def next_token_loss(model: RamNetForCausalLM) -> Callable[[Tensor], Tensor]:
    def loss(text: Tensor) -> Tensor:
        return F.cross_entropy(model(text[:, :-1]).logits.flatten(0, 1), text[:, 1:].flatten())

    return loss


@torch.no_grad()
def test_any_length_is_served_by_two_graphs(kernels: str) -> None:
    model = small_model()
    compiled, counter = one_graph(model)
    for length in LENGTHS:
        out, expected = compiled(ids(2, length)), model(ids(2, length))
        assert relative_rmse(out.logits, expected.logits) < 1e-5
        assert_states_match(out.state, expected.state)
    assert counter.frame_count <= STATIC_AND_DYNAMIC


@torch.no_grad()
def test_a_sequence_goes_on_from_its_state_in_the_same_graphs(kernels: str) -> None:
    model = small_model(num_layers=2)
    compiled, counter = one_graph(model)
    state, right = RamState.zeros(model.config, 2), RamState.zeros(model.config, 2)
    for length in LENGTHS:
        before = state.clone()
        out, expected = compiled(ids(2, length), state), model(ids(2, length), right)
        assert relative_rmse(out.logits, expected.logits) < 1e-5
        assert_states_match(state, before)
        state, right = out.state, expected.state
    assert_states_match(state, right)
    assert state.position.tolist() == [sum(LENGTHS)] * 2
    assert counter.frame_count <= STATIC_AND_DYNAMIC


@torch.no_grad()
def test_a_token_in_place_is_one_graph_at_every_position(kernels: str) -> None:
    model = small_model()
    compiled, counter = one_graph(model)
    state, whole = RamState.zeros(model.config, 2), model(ids(2, 5))
    for t in range(5):
        out = compiled(ids(2, 5)[:, t : t + 1], state, in_place=True)
        assert relative_rmse(out.logits[:, 0], whole.logits[:, t]) < 1e-5
    assert_states_match(state, whole.state)
    assert counter.frame_count == 1


def test_training_steps_of_any_length_are_two_graphs_and_learn_the_same(kernels: str) -> None:
    """The loss compiled with the model, its backward through AOT autograd, the optimizer between."""
    models = small_model(), small_model()
    compiled, counter = one_graph(next_token_loss(models[0]))
    losses = compiled, next_token_loss(models[1])
    # SGD, as Adam turns the rounding error of a gradient near 0 into a whole step.
    optimizers = [torch.optim.SGD(model.parameters(), lr=0.5) for model in models]
    for length in LENGTHS:
        got = []
        for loss, optimizer in zip(losses, optimizers, strict=True):
            optimizer.zero_grad()
            value = loss(ids(2, length + 1))
            value.backward()
            optimizer.step()
            got.append(float(value.detach()))
        assert got[0] == pytest.approx(got[1], rel=1e-4)
    for (name, ours), theirs in zip(models[0].named_parameters(), models[1].parameters(), strict=True):
        assert relative_rmse(ours, theirs) < 1e-4, name
    assert counter.frame_count <= STATIC_AND_DYNAMIC


def test_gradients_reach_the_state_before(kernels: str) -> None:
    model = small_model()
    compiled, _ = one_graph(model)
    gradients = []
    for call in (compiled, model):
        state = RamState.zeros(model.config, 2)
        leaves = [x.requires_grad_() for x in (*state.memory, *state.mass)]
        out = call(ids(2, 9), state)
        loss = out.logits.square().mean() + sum(x.square().mean() for x in out.state.memory)
        gradients.append(torch.autograd.grad(loss, leaves))
    for actual, right in zip(*gradients, strict=True):
        assert relative_rmse(actual, right) < 1e-4


def test_generated_code_gives_the_same_loss_and_gradients(kernels: str) -> None:
    model = small_model(conv_layers=0, cape_half_layers=0, intermediate_size=0)
    compiled, counter = one_graph(next_token_loss(model), "inductor")
    results = []
    for loss in (compiled, next_token_loss(model)):
        model.zero_grad()
        value = loss(ids(2, 10))
        value.backward()
        results.append([value, *(p.grad.clone() for p in model.parameters() if p.grad is not None)])
    for actual, right in zip(*results, strict=True):
        assert relative_rmse(actual, right) < 1e-4
    assert counter.frame_count == 1


@pytest.mark.parametrize("how", ["weights", "autocast"])
def test_bfloat16_trains_and_decodes_on_a_float32_state(kernels: str, how: str) -> None:
    """bfloat16 weights give bfloat16 inputs of all ops; autocast gives float32 weights and bfloat16 values."""
    model = small_model().to(torch.bfloat16 if how == "weights" else torch.float32)
    exact = small_model().to(model.head.weight.dtype).float()  # the same weights
    right = next_token_loss(exact)(ids(2, 10)).item()
    compiled, _ = one_graph(next_token_loss(model))
    with torch.autocast("cpu", dtype=torch.bfloat16, enabled=how == "autocast"):
        value = compiled(ids(2, 10))
        value.backward()
        assert all(p.grad is not None and bool(p.grad.isfinite().all()) for p in model.parameters())
        assert float(value.detach()) == pytest.approx(right, rel=0.02)
        with torch.no_grad():
            whole, state = model(ids(2, 5)), RamState.zeros(model.config, 2)
            for t in range(5):
                logits = model(ids(2, 5)[:, t : t + 1], state, in_place=True).logits
                assert relative_rmse(logits[:, 0], whole.logits[:, t]) < 0.05
    assert {x.dtype for x in (*whole.state.memory, *whole.state.mass, *state.memory, *state.mass)} == {torch.float32}
