"""cu_seqlens: packing changes neither a document's logits nor its gradients nor its state."""

from __future__ import annotations

import math
import re
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor
from torch._dynamo.testing import CompileCounterWithBackend

from ramnet import RamLayer, RamNetForCausalLM, RamState, Sequences, ops
from ramnet.ops import library
from ramnet.ops.packed import alike
from tests import brute_force
from tests.ramnet.test_model import SMALL, assert_states_match, small_model, tokens
from tests.samples import DIFFERENTIABLE, relative_rmse, scan_inputs

# One token, some, none, the longest, and shorter than the convolution.
LENGTHS = [1, 7, 0, 12, 2]
BOUNDS = torch.tensor([0, 1, 8, 8, 20, 22])
TOKENS = 22


def alone(model: RamNetForCausalLM, ids: Tensor, state: RamState | None = None) -> list[Any]:
    """Run the model on each document alone."""
    states = [None] * len(LENGTHS) if state is None else state.split()
    return [model(document, own) for document, own in zip(ids.split(LENGTHS, dim=1), states, strict=True)]


@pytest.mark.parametrize("kind", [torch.int32, torch.int64])
def test_logits_equal_the_papers_definition_on_each_document(kernels: str, kind: torch.dtype) -> None:
    model, ids = small_model(conv_layers=0).double(), tokens(1, TOKENS)
    logits = model(ids, cu_seqlens=BOUNDS.to(kind)).logits
    for document, found in zip(ids.split(LENGTHS, dim=1), logits.split(LENGTHS, dim=1), strict=True):
        if document.numel():
            exact = brute_force.language_model(model.config, dict(model.state_dict()), document)
            assert relative_rmse(found, exact) <= 1e-10


@pytest.mark.parametrize("conv_kernel", [1, 3])
@pytest.mark.parametrize("begun", [False, True])
def test_logits_states_and_gradients_are_those_of_the_documents_alone(
    kernels: str, begun: bool, conv_kernel: int
) -> None:
    model, ids = small_model(conv_kernel=conv_kernel).double(), tokens(1, TOKENS)
    with torch.no_grad():
        earlier = [model(tokens(1, 3 * i + 1, seed=i)).state for i in range(len(LENGTHS))]
    state = RamState.merge(earlier) if begun else None
    out, each = model(ids, state, cu_seqlens=BOUNDS), alone(model, ids, state)
    assert out.state.batch_size == len(LENGTHS)
    assert relative_rmse(out.logits, torch.cat([one.logits for one in each], 1)) <= 1e-10
    for own, one in zip(out.state.split(), each, strict=True):
        assert_states_match(own, one.state, 1e-10)
    cotangent = torch.randn(out.logits.shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    losses = [(out.logits * cotangent).sum() + sum(x.square().sum() for x in out.state.memory)]
    parts = zip(each, cotangent.split(LENGTHS, dim=1), strict=True)
    losses.append(sum((one.logits * g).sum() + sum(x.square().sum() for x in one.state.memory) for one, g in parts))
    grads, right = (torch.autograd.grad(loss, list(model.parameters())) for loss in losses)
    for (name, _), grad, exact in zip(model.named_parameters(), grads, right, strict=True):
        assert relative_rmse(grad, exact) <= 1e-8, name


def test_a_document_does_not_depend_on_those_before(kernels: str) -> None:
    model, ids = small_model(), tokens(1, TOKENS)
    changed = ids.clone()
    changed[0, :8] = (ids[0, :8] + 1) % 11
    a, b = (model(x, cu_seqlens=BOUNDS).logits for x in (ids, changed))
    assert torch.equal(a[:, 8:], b[:, 8:])
    assert bool((a[:, :8] != b[:, :8]).any(-1).all())


@torch.no_grad()
def test_documents_continue_in_another_call_and_token_by_token(kernels: str) -> None:
    model, ids, later = small_model(), tokens(1, TOKENS), tokens(5, 3, seed=2)
    state = model(ids, cu_seqlens=BOUNDS).state
    assert state.position.tolist() == LENGTHS
    expected = [model(row.unsqueeze(0), one.state) for row, one in zip(later, alone(model, ids), strict=True)]
    packed = model(later.view(1, 15), state, cu_seqlens=torch.arange(0, 16, 3))
    assert relative_rmse(packed.logits.view(5, 3, 11), torch.cat([one.logits for one in expected])) <= 1e-5
    for t in range(3):
        logits = model(later[:, t : t + 1], state, in_place=True).logits
        assert relative_rmse(logits[:, 0], packed.logits.view(5, 3, 11)[:, t]) <= 1e-5
    assert_states_match(state, packed.state)


def test_a_layer_takes_documents_and_layers_can_share_sequences() -> None:
    torch.manual_seed(0)
    layer, x = RamLayer(12, 3, order=3, sub_dim=3, top_k=4, cape_heads=1), torch.randn(1, TOKENS, 12)
    out, state = layer(x, cu_seqlens=BOUNDS)
    made = Sequences.packed(BOUNDS, (1, TOKENS), x.device)
    assert torch.equal(layer(x, sequences=made).output, out)
    for document, found in zip(x.split(LENGTHS, dim=1), out.split(LENGTHS, dim=1), strict=True):
        assert relative_rmse(found, layer(document).output) <= 1e-5
    assert state.memory[0].shape[0] == 5 and state.position.tolist() == LENGTHS


def test_no_tokens_give_no_logits_and_the_same_state(kernels: str) -> None:
    model = small_model()
    state = model(tokens(2, 5)).state
    out = model(tokens(1, 0), state, cu_seqlens=torch.tensor([0, 0, 0]))
    assert out.logits.shape == (1, 0, 11)
    assert_states_match(out.state, state, tolerance=0)


@pytest.mark.parametrize("kernels", ["cpu"], indirect=True)
def test_documents_compile_in_one_graph_for_any_bounds_and_are_exported(kernels: str) -> None:
    # Tracing takes a second a layer: one, with CAPE on one of its heads.
    model, ids = small_model(conv_layers=1, num_layers=1, cape_full_layers=0), tokens(1, TOKENS)
    torch.compiler.reset()
    graphs = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(model, fullgraph=True, dynamic=True, backend=graphs)
    exported = torch.export.export(model, (ids,), {"cu_seqlens": BOUNDS}).module()
    made = []
    for bounds in (BOUNDS, torch.tensor([0, 9, 9, 10, 11, 22])):
        expected = model(ids, cu_seqlens=bounds)
        right = torch.autograd.grad(expected.logits.square().sum(), list(model.parameters()))
        for call in (compiled, exported):
            out = call(ids, cu_seqlens=bounds)
            assert relative_rmse(out.logits, expected.logits) <= 1e-6
            assert_states_match(out.state, expected.state, 1e-6)
        grads = torch.autograd.grad(compiled(ids, cu_seqlens=bounds).logits.square().sum(), list(model.parameters()))
        for (name, _), a, b in zip(model.named_parameters(), grads, right, strict=True):
            assert relative_rmse(a, b) <= 1e-4, name
        made.append(graphs.frame_count)
    assert made[0] == made[1]
    with pytest.raises(ValueError, match="cu_seqlens falls from 9 to 8; it must be ascending"):
        compiled(ids, cu_seqlens=torch.tensor([0, 3, 9, 8, 11, 22]))


def packed_scan(lengths: list[int]) -> dict[str, Tensor]:
    inputs = scan_inputs(1, 3, sum(lengths), 4, 27, 5)
    states = scan_inputs(len(lengths), 3, 1, 4, 27, 5)
    inputs |= {"memory": states["memory"], "mass": states["mass"]}
    leaves = {name: x.requires_grad_(name in DIFFERENTIABLE) for name, x in inputs.items()}
    return leaves | {"cu_seqlens": torch.tensor([0, *lengths]).cumsum(0)}


def test_opcheck_of_the_packed_scan(kernels: str) -> None:
    arguments = tuple(packed_scan(LENGTHS).values())
    torch.library.opcheck(torch.ops.ramnet.memory_scan_packed.default, arguments, {"kernels": kernels})
    grads = [torch.ones_like(arguments[i]) for i in (4, 5, 6)]
    backward = (*grads, *(x.detach() for x in arguments), 0.5, 1e-6, 0.01, kernels)
    torch.library.opcheck(torch.ops.ramnet.memory_scan_packed_backward.default, backward)


def test_short_documents_are_not_padded_to_the_longest(monkeypatch: pytest.MonkeyPatch) -> None:
    sizes = []

    def scan(*arguments: Any) -> Any:
        sizes.append(arguments[4].shape)  # values [R, H, L, D]
        return library.memory_scan(*arguments)

    monkeypatch.setattr("ramnet.ops.packed.library", SimpleNamespace(memory_scan=scan))
    lengths = [1, 60, 3, 2, 1, 0, 5, 30, 2]
    ops.memory_scan(**packed_scan(lengths))
    assert sum(shape[0] for shape in sizes) == len(lengths)
    assert sum(shape[0] * shape[2] for shape in sizes) <= 2 * sum(max(1, length) for length in lengths)


@pytest.mark.parametrize("seed", range(20))
def test_padding_at_most_doubles_the_tokens_of_a_group(seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    lengths = torch.randn(50, generator=generator).mul(2).add(3).exp().floor().int().tolist()
    groups = alike(lengths)
    assert sorted(i for group in groups for i in group) == list(range(50))
    assert len(groups) <= math.log2(max(lengths)) + 1
    for group in groups:
        own = [max(1, lengths[i]) for i in group]
        assert len(own) * max(own) <= 2 * sum(own)


@pytest.mark.parametrize(
    ("changed", "error", "message"),
    [
        ({"cu_seqlens": torch.tensor([0, 22])}, ValueError, "memory has shape [5, 3, 27, 5]; it must begin with R = 1"),
        ({"mass": torch.zeros(4, 3, 27)}, ValueError, "mass has shape [4, 3, 27]; it must begin with R = 5"),
        ({"cu_seqlens": BOUNDS.int()}, TypeError, "cu_seqlens is torch.int32; it must be torch.int64"),
        ({"cu_seqlens": BOUNDS + 1}, ValueError, "cu_seqlens goes from 1 to 23; it must go from 0 to 22"),
        (
            {name: x.repeat(2, 1, 1, 1) for name, x in scan_inputs(1, 3, TOKENS, 4, 27, 5).items() if x.dim() == 4},
            ValueError, "values has shape [2, 3, 22, 5]; packed documents are one row, [1, H, T, D]",
        ),
    ],
)  # fmt: skip
def test_the_scan_refuses_documents_that_do_not_fit(
    changed: dict[str, Tensor], error: type[Exception], message: str
) -> None:
    with pytest.raises(error, match="^" + re.escape(message) + "$"):
        ops.memory_scan(**packed_scan(LENGTHS) | changed)


@torch.no_grad()
def test_a_token_in_place_is_that_of_the_only_document_that_has_one() -> None:
    model = small_model(conv_layers=1)
    before = RamState.merge([model(tokens(1, 3 * i + 1, seed=i)).state for i in range(3)])
    state, bounds = before.clone(), torch.tensor([0, 0, 1, 1])
    logits = model(tokens(1, 1), state, cu_seqlens=bounds, in_place=True).logits
    one, own = before.split()[1], state.split()
    assert relative_rmse(logits, model(tokens(1, 1), one, in_place=True).logits) <= 1e-5
    for found, expected in zip(own, (before.split()[0], one, before.split()[2]), strict=True):
        assert_states_match(found, expected)


@pytest.mark.parametrize(
    ("bounds", "error", "message"),
    [
        ([1, 22], ValueError, "cu_seqlens goes from 1 to 22; it must go from 0 to 22"),
        ([0, 21], ValueError, "cu_seqlens goes from 0 to 21; it must go from 0 to 22"),
        ([0, 9, 8, 22], ValueError, "cu_seqlens falls from 9 to 8; it must be ascending"),
        ([0], ValueError, "cu_seqlens has shape [1]; it must be [S + 1] with S >= 1"),
        ([[0, 22]], ValueError, "cu_seqlens has shape [1, 2]; it must be [S + 1] with S >= 1"),
        ([0.0, 22.0], TypeError, "cu_seqlens is torch.float32; it must be torch.int32 or torch.int64"),
    ],
)
def test_invalid_bounds_are_refused(bounds: Any, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match="^" + re.escape(message) + "$"):
        small_model()(tokens(1, TOKENS), cu_seqlens=torch.tensor(bounds))


def test_a_batch_and_a_mask_and_a_state_of_other_rows_are_refused() -> None:
    model = small_model()
    with pytest.raises(ValueError, match=r"cu_seqlens is given for a batch of 2; packed documents are one row"):
        model(tokens(2, TOKENS), cu_seqlens=BOUNDS)
    with pytest.raises(ValueError, match="attention_mask and cu_seqlens are both given"):
        model(tokens(1, TOKENS), cu_seqlens=BOUNDS, attention_mask=torch.ones(1, TOKENS).bool())
    with pytest.raises(
        ValueError, match=re.escape("state.memory[0] has shape [1, 3, 27, 5]; it must be [5, 3, 27, 5]")
    ):
        model(tokens(1, TOKENS), RamState.zeros(SMALL, 1), cu_seqlens=BOUNDS)
