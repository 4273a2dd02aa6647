"""Padded rows and packed documents through ``lowering.compile``, on the kernels of a CPU and of a GPU."""

from __future__ import annotations

import importlib.util

import pytest
import torch
from torch import Tensor

import lowering
from ramnet import RamNetForCausalLM, RamState
from tests.lowering.test_gpu_model import ids, model_with
from tests.samples import relative_rmse

needs_tvm = pytest.mark.skipif(importlib.util.find_spec("tvm") is None, reason="the CPU kernels need tvm")
needs_triton = pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="the GPU kernels need triton")
TARGETS = [pytest.param("cpu", marks=needs_tvm), pytest.param("a100", marks=needs_triton)]
# A single row has its own kernel on a CPU, but not on a GPU.
ONE_ROW = [pytest.param("cpu", 1, marks=needs_tvm)]
ROWS = [pytest.param("cpu", 3, marks=needs_tvm), pytest.param("a100", 3, marks=needs_triton)]
BOUNDS = torch.tensor([0, 2, 2, 6])
MASK = torch.tensor([[0, 0, 1, 1, 1, 1], [1, 1, 1, 1, 1, 0], [1, 0, 1, 1, 0, 1]])


def compiled(target: str, model: RamNetForCausalLM) -> RamNetForCausalLM:
    """Compile to graphs that run as they are: ``test_masks.py`` and ``test_packed.py`` trace gradients, too."""
    torch.compiler.reset()
    return lowering.compile(model, target, backend="eager")


def assert_states_match(actual: RamState, expected: RamState, tolerance: float = 1e-5) -> None:
    for name, tensor in actual.tensors().items():
        assert relative_rmse(tensor, expected.tensors()[name]) <= tolerance, name


@pytest.mark.parametrize("target", TARGETS)
@pytest.mark.parametrize("kind", ["padded", "packed"])
def test_logits_state_and_gradients_are_the_references(target: str, kind: str) -> None:
    model, text = model_with("half"), ids(3 if kind == "padded" else 1, 6)
    options = {"attention_mask": MASK.to(text.device)} if kind == "padded" else {"cu_seqlens": BOUNDS}
    real = options.get("attention_mask", torch.ones_like(text)).bool()
    results = []
    for call in (compiled(target, model), model):
        model.zero_grad()
        out = call(text, **options)
        out.logits[real].square().mean().backward()
        results.append((out, [p.grad.clone() for p in model.parameters() if p.grad is not None]))
    (out, grads), (expected, right) = results
    assert relative_rmse(out.logits[real], expected.logits[real]) < 1e-5
    assert_states_match(out.state, expected.state)
    assert all(relative_rmse(a, b) < 1e-4 for a, b in zip(grads, right, strict=True))


@torch.no_grad()
@pytest.mark.parametrize(("target", "batch"), [*ONE_ROW, *ROWS])
def test_tokens_in_place_go_on_from_padded_prompts(target: str, batch: int) -> None:
    model, text = model_with("half"), ids(batch, 6)
    mask = MASK[:batch].to(text.device)
    fast = compiled(target, model)
    state, expected = (call(text, attention_mask=mask).state for call in (fast, model))
    for t in range(3):
        token = ids(batch, 3)[:, t : t + 1]
        logits = fast(token, state, in_place=True).logits
        assert relative_rmse(logits, model(token, expected, in_place=True).logits) < 1e-5
    assert_states_match(state, expected)


@torch.no_grad()
@pytest.mark.parametrize(("target", "batch"), [*ONE_ROW, *ROWS])
def test_a_token_in_place_that_is_padding_changes_no_bit_of_its_row(target: str, batch: int) -> None:
    model, text = model_with("half"), ids(batch, 6)
    fast = compiled(target, model)
    before = model(text).state
    mask = torch.ones_like(text[:, :1])
    mask[0] = 0
    after = fast(text[:, :1], before.clone(), attention_mask=mask, in_place=True).state.split()
    assert_states_match(after[0], before.split()[0], tolerance=0)
    for own, row in zip(after[1:], before.split()[1:], strict=True):
        assert own.position.tolist() == [7]
        assert not torch.equal(own.memory[0], row.memory[0])


class Graphs:
    """Replaces a model's token graphs; any call is an error."""

    def serve(self, input_ids: Tensor) -> bool:
        return True

    def __call__(self, input_ids: Tensor, state: RamState) -> Tensor:
        raise AssertionError("a graph knows of no sequences")


@needs_triton
@torch.no_grad()
def test_a_token_with_a_mask_or_documents_is_not_for_a_recorded_graph() -> None:
    model, text = model_with("half"), ids(1, 1)
    fast = compiled("a100", model)
    fast._graphs = Graphs()  # type: ignore[assignment]
    state = RamState.zeros(model.config, 1, device=text.device)
    fast(text, state, attention_mask=torch.ones_like(text), in_place=True)
    fast(text, state, cu_seqlens=torch.tensor([0, 1]), in_place=True)
    with pytest.raises(AssertionError, match="knows of no sequences"):
        fast(text, state, in_place=True)
