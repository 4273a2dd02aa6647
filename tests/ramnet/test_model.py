"""The model: against the paper's definition, split over calls, saved, compiled."""

from __future__ import annotations

import re
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from ramnet import RamLayer, RamNetConfig, RamNetForCausalLM, RamState
from tests import brute_force
from tests.samples import relative_rmse

# All parts: a convolution, an FFN, and CAPE on all, half and none of the heads.
SMALL = RamNetConfig(
    vocab_size=11, hidden_size=12, num_layers=3, num_heads=3, value_dim=5, order=3, sub_dim=3, top_k=4,
    cape_full_layers=1, cape_half_layers=1, intermediate_size=7, conv_layers=1, embedding_std=1.0,
    address_bias="offsets",
)  # fmt: skip


def small_model(**changes: Any) -> RamNetForCausalLM:
    torch.manual_seed(0)
    model = RamNetForCausalLM(RamNetConfig(**{**SMALL.model_dump(), **changes}))
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if any(part in name for part in ("norm", "log_scale", "bias")):  # initial ones and zeros hide mistakes
                parameter.add_(0.3 * torch.randn_like(parameter))
    return model.eval()


def tokens(batch: int, length: int, seed: int = 0) -> Tensor:
    return torch.randint(11, (batch, length), generator=torch.Generator().manual_seed(seed))


def assert_states_match(actual: RamState, expected: RamState, tolerance: float = 1e-5) -> None:
    theirs = expected.tensors()
    assert actual.tensors().keys() == theirs.keys()
    for name, tensor in actual.tensors().items():
        assert relative_rmse(tensor, theirs[name]) <= tolerance, name


def test_the_340m_model_has_the_papers_parameters() -> None:
    with torch.device("meta"):
        model = RamNetForCausalLM(RamNetConfig.preset("340m"))
    total = sum(parameter.numel() for parameter in model.parameters())
    assert total - model.embedding.weight.numel() == 340_769_632
    state = RamState.zeros(model.config, 1, device="meta")
    assert sum(x.numel() for x in (*state.memory, *state.mass)) == 27 * 16 * 1024 * 65


def test_the_initial_embedding_has_the_configured_standard_deviation() -> None:
    weight = small_model(vocab_size=1000, embedding_std=0.02).embedding.weight.detach()
    assert float(weight.std()) == pytest.approx(0.02, rel=0.05)
    assert float(weight.mean()) == pytest.approx(0, abs=0.001)


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"decay_power": 0.5, "temperature": 0.7, "top_k": 27, "eps": 0.1},
        {"decay_power": 0.0, "intermediate_size": 0, "num_heads": 2, "top_k": 1},
        {"decay_power": 2.0, "order": 2, "sub_dim": 5, "tie_embeddings": True, "proxy_eps": 0.3},
        {
            "num_heads": [8, 4, 2],
            "value_dim": [2, 3, 7],
            "order": [2, 3, 1],
            "sub_dim": [4, 4, 64],
            "top_k": [4, 8, 16],
        },
    ],
)
def test_logits_and_gradients_equal_the_papers_definition(changes: dict[str, Any]) -> None:
    model = small_model(conv_layers=0, **changes).double()
    ids = tokens(2, 33)
    logits = model(ids).logits
    parameters = {name: x.detach().clone().requires_grad_() for name, x in model.named_parameters()}
    if model.config.tie_embeddings:
        parameters["head.weight"] = parameters["embedding.weight"]

    expected = brute_force.language_model(model.config, parameters, ids)
    assert relative_rmse(logits, expected) <= 1e-12
    cotangent = torch.randn(logits.shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    grads = torch.autograd.grad(logits, list(model.parameters()), cotangent)
    right = torch.autograd.grad(expected, [parameters[name] for name, _ in model.named_parameters()], cotangent)
    for (name, _), actual, exact in zip(model.named_parameters(), grads, right, strict=True):
        assert relative_rmse(actual, exact) <= 1e-10, name


def test_kernels_and_reference_give_the_same_model(kernels: str) -> None:
    model = small_model(conv_layers=0)
    expected = brute_force.language_model(model.config, dict(model.state_dict()), tokens(2, 63))
    assert relative_rmse(model(tokens(2, 63)).logits, expected) <= 1e-5


@settings(max_examples=10)
@given(data=st.data(), length=st.integers(0, 20), seed=st.integers(0, 99))
def test_any_split_gives_the_same(kernels: str, data: st.DataObject, length: int, seed: int) -> None:
    model, ids = small_model(), tokens(2, length, seed)
    cuts = sorted(data.draw(st.lists(st.integers(0, length), max_size=5), label="cuts"))
    whole = model(ids)
    state, logits = None, []
    for start, stop in zip([0, *cuts], [*cuts, length], strict=True):
        out = model(ids[:, start:stop], state)
        state = out.state
        logits.append(out.logits)
    assert relative_rmse(torch.cat(logits, 1), whole.logits) <= 1e-5
    assert_states_match(out.state, whole.state)
    assert out.state.position.tolist() == [length, length]


@torch.no_grad()
def test_steps_in_place_equal_one_call(kernels: str) -> None:
    model, ids = small_model(), tokens(2, 20)
    whole = model(ids)
    state = RamState.zeros(SMALL, 2)
    addresses = {name: x.data_ptr() for name, x in state.tensors().items()}
    for t in range(20):
        out = model(ids[:, t : t + 1], state, in_place=True)
        assert relative_rmse(out.logits[:, 0], whole.logits[:, t]) <= 1e-5
        assert out.state is state
    assert {name: x.data_ptr() for name, x in state.tensors().items()} == addresses
    assert_states_match(state, whole.state)


@torch.no_grad()
def test_a_state_is_not_modified_unless_in_place(kernels: str) -> None:
    model = small_model()
    state = model(tokens(2, 5)).state
    before = state.clone()
    model(tokens(2, 5, seed=1), state)
    model(tokens(2, 1), state)
    assert_states_match(state, before, tolerance=0)


def test_no_tokens_give_no_logits_and_the_same_state(kernels: str) -> None:
    model = small_model()
    state = model(tokens(2, 5)).state
    out = model(tokens(2, 0), state)
    assert out.logits.shape == (2, 0, 11)
    assert_states_match(out.state, state, tolerance=0)


@pytest.mark.parametrize(("kept", "length"), [(0, 7), (1, 1), (3, 3), (7, 7), (9, 7)])
def test_logits_of_the_last_tokens_alone(kernels: str, kept: int, length: int) -> None:
    model, ids = small_model(), tokens(2, 7)
    out, whole = model(ids, logits_to_keep=kept), model(ids)
    assert out.logits.shape == (2, length, 11)
    assert relative_rmse(out.logits, whole.logits[:, -length:]) <= 1e-6
    assert_states_match(out.state, whole.state, tolerance=0)
    assert model(ids[:, :0], logits_to_keep=kept).logits.shape == (2, 0, 11)


def test_a_batch_is_its_sequences_one_by_one() -> None:
    model, ids = small_model(), tokens(3, 17)
    whole = model(ids)
    order = torch.tensor([2, 0])
    again = model(ids[order])
    assert relative_rmse(again.logits, whole.logits[order]) <= 1e-6
    assert_states_match(again.state, whole.state.reorder(order), 1e-6)


@torch.no_grad()
def test_rows_of_different_lengths_are_merged_and_go_on_as_each_alone(kernels: str) -> None:
    model, ids = small_model(), tokens(3, 40)
    states = [model(ids[i : i + 1, :length]).state for i, length in enumerate((3, 17, 29))]
    merged = RamState.merge(states)
    more = model(ids[:, 30:], merged)
    for t in range(30, 40):
        step = model(ids[:, t : t + 1], merged, in_place=True)
        assert relative_rmse(step.logits[:, 0], more.logits[:, t - 30]) <= 1e-5
    assert merged.position.tolist() == more.state.position.tolist() == [13, 27, 39]
    alone = [model(ids[i : i + 1, 30:], state) for i, state in enumerate(states)]
    assert relative_rmse(more.logits, torch.cat([out.logits for out in alone])) <= 1e-5
    for state, own, right in zip(more.state.split(), merged.split(), alone, strict=True):
        assert_states_match(state, right.state)
        assert_states_match(own, right.state)


def test_a_token_has_no_influence_on_those_before() -> None:
    model, ids = small_model(), tokens(1, 20)
    changed = ids.clone()
    changed[0, 9] = (ids[0, 9] + 1) % 11
    a, b = model(ids).logits, model(changed).logits
    assert torch.equal(a[:, :9], b[:, :9])
    assert bool((a[:, 9:] != b[:, 9:]).any(-1).all())


@torch.no_grad()
def test_if_all_heads_use_cape_the_start_position_does_not_matter() -> None:
    model = small_model(cape_full_layers=3, cape_half_layers=0)
    late = RamState.zeros(SMALL, 1)
    late.position.fill_(10**12)
    expected = model(tokens(1, 40))
    out = model(tokens(1, 40), late)
    assert relative_rmse(out.logits, expected.logits) <= 1e-6
    rotated = expected.state.memory[0].roll(-(10**12 % 27), dims=2)
    assert relative_rmse(out.state.memory[0], rotated) <= 1e-6


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_other_types_of_weights_keep_a_state_of_float32_or_wider(dtype: torch.dtype) -> None:
    model = small_model().to(dtype)
    out = model(tokens(2, 20))
    assert out.logits.dtype == dtype and bool(out.logits.isfinite().all())
    assert {x.dtype for x in (*out.state.memory, *out.state.mass)} == {torch.promote_types(dtype, torch.float32)}


def test_compiles_in_one_graph(kernels: str) -> None:
    model = small_model()
    torch.compiler.reset()
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    expected, actual = model(tokens(2, 9)), compiled(tokens(2, 9))
    assert relative_rmse(actual.logits, expected.logits) <= 1e-6
    assert_states_match(actual.state, expected.state, 1e-6)
    leaves = list(model.parameters())
    grads, right = (torch.autograd.grad(out.logits.square().sum(), leaves) for out in (actual, expected))
    for (name, _), a, b in zip(model.named_parameters(), grads, right, strict=True):
        assert relative_rmse(a, b) <= 1e-4, name


@torch.no_grad()
def test_a_step_in_place_compiles_in_one_graph(kernels: str) -> None:
    model = small_model()
    torch.compiler.reset()
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    start = model(tokens(2, 9)).state
    state, right = start.clone(), start.clone()
    for t in range(3):
        actual = compiled(tokens(2, 1, seed=t), state, in_place=True)
        expected = model(tokens(2, 1, seed=t), right, in_place=True)
        assert relative_rmse(actual.logits, expected.logits) <= 1e-6
    assert_states_match(state, right, 1e-6)


def test_bad_input() -> None:
    model = small_model()
    with pytest.raises(ValueError, match=r"input_ids has shape \[9\]; it must be \[B, T\]"):
        model(tokens(1, 9)[0])
    with pytest.raises(TypeError, match=r"input_ids is torch\.float32; it must be torch\.int64"):
        model(tokens(1, 9).float())
    with pytest.raises(ValueError, match="in_place takes one token at a time, not 2"):
        model(tokens(1, 2), in_place=True)
    with pytest.raises(ValueError, match="logits_to_keep is -1; it must be >= 0"):
        model(tokens(1, 2), logits_to_keep=-1)


@pytest.mark.parametrize("dtype", [torch.int64, torch.int32])
@pytest.mark.parametrize(("wrong", "named"), [(11, "11"), (-1, "-1"), (2**31 - 1, "2147483647")])
def test_an_id_outside_the_vocabulary_is_named_and_the_state_stays(
    kernels: str, dtype: torch.dtype, wrong: int, named: str
) -> None:
    model, state = small_model(), RamState.zeros(SMALL, 2)
    before = state.clone()
    ids = tokens(2, 3).to(dtype)
    ids[1, 2] = wrong
    message = rf"^input_ids holds {named}; token ids must be in 0\.\.10$"
    with pytest.raises(ValueError, match=message):
        model(ids, state)
    with torch.no_grad(), pytest.raises(ValueError, match=message):
        model(ids[:, 2:], state, in_place=True)
    assert_states_match(state, before, tolerance=0)


@pytest.mark.parametrize(
    ("state", "message"),
    [
        (RamState.zeros(SMALL, 3), "state.memory[0] has shape [3, 3, 27, 5]; it must be [2, 3, 27, 5]"),
        (RamState.zeros(RamNetConfig(**{**SMALL.model_dump(), "num_layers": 2}), 2), "state.memory has 2 layers"),
        (RamState.zeros(RamNetConfig(**{**SMALL.model_dump(), "conv_layers": 0}), 2), "state.conv has 0 layers"),
        (RamState.zeros(SMALL, 2, device="meta"), "state.memory[0] is on meta but input_ids is on cpu"),
    ],
)
def test_a_state_of_another_model_batch_or_device_is_refused(state: RamState, message: str) -> None:
    with pytest.raises(ValueError, match=re.escape(message)):
        small_model()(tokens(2, 3), state)


@pytest.mark.parametrize("kernels", ["", "cpu"], indirect=True)
def test_a_step_in_place_that_is_asked_for_gradients_is_refused_and_changes_nothing(kernels: str) -> None:
    model = small_model()
    with torch.no_grad():
        state = model(tokens(2, 3)).state
    before = state.clone()
    layer = RamLayer(8, 2, order=2, sub_dim=3, top_k=2)
    with pytest.raises(
        ValueError, match=r"in_place is True, which computes no gradients; call it under torch\.no_grad"
    ):
        model(tokens(2, 1), state, in_place=True)
    for parameter in layer.requires_grad_(False).parameters():
        assert not parameter.requires_grad
    layer(torch.ones(2, 1, 8), in_place=True)
    with pytest.raises(ValueError, match="in_place is True, which computes no gradients"):
        layer(torch.ones(2, 1, 8, requires_grad=True), in_place=True)
    assert_states_match(state, before, tolerance=0)
