"""A state works with pytrees, torch.export, torch.func, torch.compile and DDP."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from torch import Tensor
from torch.nn.parallel import DistributedDataParallel
from torch.utils import _pytree as pytree

from ramnet import RamLayer, RamNetOutput, RamState
from tests.ramnet.test_model import assert_states_match, small_model, tokens
from tests.samples import relative_rmse


def assert_outputs_match(actual: RamNetOutput, expected: RamNetOutput) -> None:
    assert isinstance(actual, RamNetOutput) and isinstance(actual.state, RamState)
    assert relative_rmse(actual.logits, expected.logits) <= 1e-6
    assert_states_match(actual.state, expected.state, 1e-6)


def test_a_state_is_a_pytree_of_its_tensors() -> None:
    state = small_model()(tokens(2, 5)).state
    leaves, shape = pytree.tree_flatten(state)
    assert all(a is b for a, b in zip(leaves, state.tensors().values(), strict=True))
    assert_states_match(pytree.tree_unflatten(leaves, shape), state, tolerance=0)
    doubled = pytree.tree_map(lambda x: 2 * x, {"mine": [state]})["mine"][0]
    assert isinstance(doubled, RamState)
    assert torch.equal(doubled.mass[1], 2 * state.mass[1])


def test_an_exported_program_is_called_as_the_model_whatever_batch_and_length() -> None:
    model, sizes = small_model(), {0: torch.export.Dim("batch"), 1: torch.export.Dim("tokens")}
    program = torch.export.export(model, (tokens(2, 9),), dynamic_shapes=(sizes,)).module()
    for batch, length in ((2, 9), (3, 17), (4, 2)):
        assert_outputs_match(program(tokens(batch, length)), model(tokens(batch, length)))


def test_an_exported_program_takes_a_state_and_survives_its_file(tmp_path: Path) -> None:
    model = small_model()
    state = model(tokens(2, 5)).state
    torch.export.save(torch.export.export(model, (tokens(2, 9), state)), tmp_path / "model.pt2")
    program = torch.export.load(tmp_path / "model.pt2").module()
    later = model(tokens(2, 7, seed=1)).state
    assert_outputs_match(program(tokens(2, 9), later), model(tokens(2, 9), later))


def test_a_functional_call_takes_and_gives_a_state() -> None:
    model, other = small_model(), {name: 1.1 * x.detach() for name, x in small_model().named_parameters()}
    state = model(tokens(2, 5)).state
    out = torch.func.functional_call(model, other, (tokens(2, 7), state))
    model.load_state_dict(other)
    assert_outputs_match(out, model(tokens(2, 7), state))


@pytest.mark.parametrize("kernels", ["cpu"], indirect=True)
def test_a_compiled_caller_takes_and_gives_a_state(kernels: str) -> None:
    model = small_model()

    def twice(ids: Tensor, state: RamState) -> tuple[Tensor, RamState]:
        out = model(ids, state)
        return model(ids, out.state).logits, out.state

    torch.compiler.reset()
    state = model(tokens(2, 5)).state
    logits, after = torch.compile(twice, fullgraph=True, backend="aot_eager")(tokens(2, 7), state)
    expected, right = twice(tokens(2, 7), state)
    assert relative_rmse(logits, expected) <= 1e-6
    assert_states_match(after, right, 1e-6)


def test_a_layer_is_exported_too() -> None:
    torch.manual_seed(0)
    layer, x = RamLayer(12, 3, order=3, sub_dim=3, top_k=4), torch.randn(2, 9, 12)
    program = torch.export.export(layer, (x,)).module()
    assert relative_rmse(program(x).output, layer(x).output) <= 1e-6


@pytest.fixture
def distributed(tmp_path: Path) -> Iterator[DistributedDataParallel]:
    """A model in a group of one process."""
    store = f"file://{tmp_path / 'store'}"
    torch.distributed.init_process_group("gloo", init_method=store, rank=0, world_size=1)
    yield DistributedDataParallel(small_model())
    torch.distributed.destroy_process_group()


def test_a_distributed_model_trains_on_from_a_state(distributed: DistributedDataParallel) -> None:
    model = small_model()
    with torch.no_grad():
        state = model(tokens(2, 5)).state
    gradients = []
    for call in (distributed, model):
        out = call(tokens(2, 7), state)
        (out.logits.square().mean() + out.state.memory[0].square().mean()).backward()
        gradients.append([x.grad for x in call.parameters()])
    for actual, right in zip(*gradients, strict=True):
        assert relative_rmse(actual, right) <= 1e-6
