"""A model of the 340m model's shapes with fewer layers on this machine's GPU: tokens, gradients, graphs."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

import lowering
from autotune.measure.cuda_clock import captured
from ramnet import RamNetConfig, RamNetForCausalLM, RamState
from tests.gpu.conftest import DEVICE
from tests.samples import relative_rmse

BATCH, TOKENS, DECODED = 4, 256, 8
CONFIG = RamNetConfig.preset("340m").model_copy(
    update={"num_layers": 3, "vocab_size": 1000, "cape_full_layers": 1, "cape_half_layers": 1}
)


@pytest.fixture
def model() -> RamNetForCausalLM:
    torch.manual_seed(0)
    return RamNetForCausalLM(CONFIG).to(DEVICE)


@pytest.fixture
def ids() -> Tensor:
    return torch.randint(1000, (BATCH, TOKENS + 1), generator=torch.Generator().manual_seed(1)).to(DEVICE)


def decoded(model: RamNetForCausalLM, ids: Tensor, state: RamState) -> Tensor:
    """Return the logits of the first tokens, decoded one by one."""
    with torch.no_grad():
        return torch.cat([model(ids[:, t : t + 1], state, in_place=True).logits for t in range(DECODED)], 1)


def zeros(batch: int = BATCH) -> RamState:
    return RamState.zeros(CONFIG, batch, device=DEVICE)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
def test_tokens_from_graphs_equal_tokens_without(
    target: str, model: RamNetForCausalLM, ids: Tensor, dtype: torch.dtype
) -> None:
    model = model.to(dtype)
    graphed, plain = zeros(), zeros()
    found = decoded(lowering.compile(model, target=target, backend="eager"), ids, graphed)
    compiled = lowering.compile(model, target=target, backend="eager")
    compiled._graphs = None
    assert torch.equal(found, decoded(compiled, ids, plain))
    assert all(torch.equal(x, plain.tensors()[name]) for name, x in graphed.tensors().items())


def test_tokens_equal_the_references(target: str, model: RamNetForCausalLM, ids: Tensor) -> None:
    found, expected = zeros(), zeros()
    logits = decoded(lowering.compile(model, target=target), ids, found)
    assert relative_rmse(logits, decoded(model, ids, expected)) < 1e-3
    assert all(relative_rmse(x, expected.tensors()[name]) < 1e-3 for name, x in found.tensors().items())


def test_a_graph_of_a_step_goes_on_with_the_state(target: str, model: RamNetForCausalLM, ids: Tensor) -> None:
    compiled, state = lowering.compile(model, target=target, backend="eager"), zeros()
    with torch.no_grad():
        replay = captured(lambda: compiled(ids[:, :1], state, in_place=True))
    before = state.position.clone()
    for _ in range(5):
        replay()
    assert torch.equal(state.position, before + 5)


def test_decoding_does_not_depend_on_the_position(target: str, model: RamNetForCausalLM, ids: Tensor) -> None:
    early, late = zeros(), zeros()
    late.position.fill_(CONFIG.layers[0].slots * 1_000_000)  # a multiple of M, at which CAPE does not shift
    compiled = lowering.compile(model, target=target, backend="eager")
    assert torch.equal(decoded(compiled, ids, early), decoded(compiled, ids, late))


def gradients(call: RamNetForCausalLM, model: RamNetForCausalLM, ids: Tensor, narrow: bool) -> list[Tensor]:
    with torch.autocast(DEVICE, torch.bfloat16, enabled=narrow):
        loss = F.cross_entropy(call(ids[:, :-1]).logits.flatten(0, 1), ids[:, 1:].flatten())
    found = torch.autograd.grad(loss, list(model.parameters()), allow_unused=True)
    return [loss.detach(), *(x for x in found if x is not None)]


def test_a_compiled_training_step_has_the_references_gradients(
    target: str, model: RamNetForCausalLM, ids: Tensor
) -> None:
    expected = gradients(model, model, ids, narrow=False)
    found = gradients(lowering.compile(model, target=target), model, ids, narrow=False)
    assert all(relative_rmse(a, b) < 1e-2 for a, b in zip(found, expected, strict=True))


def test_a_compiled_training_step_in_autocast_has_those_of_the_same_kernels(
    target: str, model: RamNetForCausalLM, ids: Tensor
) -> None:
    """Compare with the kernels without torch.compile, which rounds differently, so that some addresses may differ."""
    with lowering.use(target):
        expected = gradients(model, model, ids, narrow=True)
    found = gradients(lowering.compile(model, target=target), model, ids, narrow=True)
    assert float(found[0]) == pytest.approx(float(expected[0]), rel=5e-3)
    for a, b in zip(found[1:], expected[1:], strict=True):
        assert float(a.norm()) == pytest.approx(float(b.norm()), rel=0.1)


def test_two_training_steps_give_the_same_bits(target: str, model: RamNetForCausalLM, ids: Tensor) -> None:
    torch.use_deterministic_algorithms(True, warn_only=True)
    try:
        with lowering.use(target):
            first, again = (gradients(model, model, ids, narrow=True) for _ in range(2))
    finally:
        torch.use_deterministic_algorithms(False)
    assert all(torch.equal(a, b) for a, b in zip(first, again, strict=True))
