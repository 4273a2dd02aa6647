"""attention_mask: padding changes neither a row's logits nor its gradients nor its state."""

from __future__ import annotations

import re
from typing import Any

import pytest
import torch
from torch import Tensor

from ramnet import RamLayer, RamNetForCausalLM, RamState, Sequences
from tests import brute_force
from tests.ramnet.test_model import SMALL, assert_states_match, small_model, tokens
from tests.samples import relative_rmse

LENGTH = 9
# Padding on the left, on the right, on both sides, none, within the row, and nothing but padding.
MASK = torch.tensor([
    [0, 0, 0, 1, 1, 1, 1, 1, 1],
    [1, 1, 1, 1, 1, 0, 0, 0, 0],
    [0, 1, 1, 1, 1, 1, 1, 0, 0],
    [1, 1, 1, 1, 1, 1, 1, 1, 1],
    [1, 0, 1, 1, 0, 0, 1, 1, 0],
    [0, 0, 0, 0, 0, 0, 0, 0, 0],
])  # fmt: skip
ROWS = len(MASK)


def rows_alone(model: RamNetForCausalLM, ids: Tensor, state: RamState | None = None) -> list[Any]:
    """The model's outputs for each row without its padding."""
    states = [None] * ROWS if state is None else state.split()
    real = zip(ids, MASK.bool(), states, strict=True)
    return [model(row[mask].unsqueeze(0), own) for row, mask, own in real]


def middle(model: RamNetForCausalLM) -> RamState:
    """A state in the middle of six texts of different lengths."""
    with torch.no_grad():
        return RamState.merge([model(tokens(1, 3 * i + 1, seed=i)).state for i in range(ROWS)])


@pytest.mark.parametrize("kind", [torch.bool, torch.int64, torch.uint8])
def test_logits_equal_the_papers_definition_on_each_row_alone(kernels: str, kind: torch.dtype) -> None:
    model, ids = small_model(conv_layers=0).double(), tokens(ROWS, LENGTH)
    logits = model(ids, attention_mask=MASK.to(kind)).logits
    for row, mask, found in zip(ids[:5], MASK.bool(), logits, strict=False):
        exact = brute_force.language_model(model.config, dict(model.state_dict()), row[mask].unsqueeze(0))
        assert relative_rmse(found[mask], exact[0]) <= 1e-10


@pytest.mark.parametrize("conv_kernel", [1, 3, 7])
@pytest.mark.parametrize("begun", [False, True])
def test_logits_state_and_gradients_are_those_of_the_rows_alone(kernels: str, begun: bool, conv_kernel: int) -> None:
    model, ids = small_model(conv_kernel=conv_kernel).double(), tokens(ROWS, LENGTH)
    state = middle(model) if begun else None
    out, alone = model(ids, state, attention_mask=MASK), rows_alone(model, ids, state)
    cotangent = torch.randn(out.logits.shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    cotangent *= MASK.unsqueeze(2)
    loss = (out.logits * cotangent).sum() + sum(x.square().sum() for x in (*out.state.memory, *out.state.mass))
    right = torch.zeros((), dtype=torch.float64)
    for i, (one, own) in enumerate(zip(alone, out.state.split(), strict=True)):
        mask = MASK[i].bool()
        assert relative_rmse(out.logits[i, mask], one.logits[0]) <= 1e-10
        assert_states_match(own, one.state, 1e-10)
        right = right + (one.logits[0] * cotangent[i, mask]).sum()
        right = right + sum(x.square().sum() for x in (*one.state.memory, *one.state.mass))
    grads, expected = (torch.autograd.grad(x, list(model.parameters())) for x in (loss, right))
    for (name, _), grad, exact in zip(model.named_parameters(), grads, expected, strict=True):
        assert relative_rmse(grad, exact) <= 1e-8, name


@torch.no_grad()
def test_a_left_padded_prompt_goes_on_token_by_token(kernels: str) -> None:
    model, ids, later = small_model(), tokens(2, LENGTH), tokens(2, 4, seed=2)
    state = model(ids, attention_mask=MASK[[0, 3]]).state
    alone = [model(ids[:1, 3:]).state, model(ids[1:]).state]
    for t in range(4):
        logits = model(later[:, t : t + 1], state, in_place=True).logits
        for i, own in enumerate(alone):
            expected = model(later[i : i + 1, t : t + 1], own, in_place=True).logits
            assert relative_rmse(logits[i], expected[0]) <= 1e-5
    assert state.position.tolist() == [LENGTH - 3 + 4, LENGTH + 4]


@torch.no_grad()
def test_padding_leaves_a_rows_state_as_it_is_bit_by_bit(kernels: str) -> None:
    model = small_model()
    before = middle(model)
    for ids, in_place in ((tokens(ROWS, 5), False), (tokens(ROWS, 1), True)):
        mask = torch.ones_like(ids)
        mask[2] = 0
        state = model(ids, before.clone(), attention_mask=mask, in_place=in_place).state
        after, unchanged = state.split(), before.split()
        assert_states_match(after[2], unchanged[2], tolerance=0)
        expected = model(ids[:1], unchanged[0])
        assert_states_match(after[0], expected.state)


def test_the_values_at_padding_do_not_change_a_bit(kernels: str) -> None:
    model, ids = small_model(), tokens(ROWS, LENGTH)
    others = torch.where(MASK.bool(), ids, tokens(ROWS, LENGTH, seed=7))
    assert bool((others != ids).any())
    a, b = (model(x, attention_mask=MASK) for x in (ids, others))
    assert torch.equal(a.logits[MASK.bool()], b.logits[MASK.bool()])
    assert_states_match(a.state, b.state, tolerance=0)


def test_a_layer_ignores_nan_in_padding(kernels: str) -> None:
    """Attention returns NaN for a row that is masked completely."""
    torch.manual_seed(0)
    layer, mask = RamLayer(12, 3, order=3, sub_dim=3, top_k=4, cape_heads=1), MASK.bool()
    clean = torch.randn(ROWS, LENGTH, 12)
    grads = []
    for value in (0.0, torch.nan):
        x = clean.masked_fill(~mask.unsqueeze(2), value).requires_grad_()
        out, state = layer(x, attention_mask=mask)
        assert bool((out[~mask] == 0).all()) and bool(state.memory[0].isfinite().all())
        grads.append(torch.autograd.grad(out.square().sum(), [x, *layer.parameters()]))
        alone = layer(clean[4:5, mask[4]])
        assert relative_rmse(out[4, mask[4]], alone.output[0]) <= 1e-5
    assert all(torch.equal(a, b) for a, b in zip(*grads, strict=True))


def test_layers_can_share_sequences() -> None:
    torch.manual_seed(0)
    layer, x = RamLayer(12, 3, order=3, sub_dim=3, top_k=4), torch.randn(ROWS, LENGTH, 12)
    made = Sequences.padded(MASK, (ROWS, LENGTH), x.device)
    assert torch.equal(layer(x, sequences=made).output, layer(x, attention_mask=MASK).output)
    assert made.lengths.tolist() == [6, 5, 6, 9, 5, 0]
    with pytest.raises(ValueError, match="sequences is given beside attention_mask or cu_seqlens; give one of them"):
        layer(x, sequences=made, attention_mask=MASK)


def test_a_mask_of_no_tokens_gives_no_logits_and_the_same_state(kernels: str) -> None:
    model = small_model()
    state = middle(model)
    out = model(tokens(ROWS, 0), state, attention_mask=MASK[:, :0])
    assert out.logits.shape == (ROWS, 0, 11)
    assert_states_match(out.state, state, tolerance=0)


@pytest.mark.parametrize("kernels", ["cpu"], indirect=True)
def test_masks_compile_in_one_graph_and_are_exported(kernels: str) -> None:
    # Tracing takes a second a layer: one with CAPE on some of its heads, and one without.
    model, ids = small_model(num_layers=2, cape_full_layers=0), tokens(ROWS, LENGTH)
    torch.compiler.reset()
    expected = model(ids, attention_mask=MASK)
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    exported = torch.export.export(model, (ids,), {"attention_mask": MASK}).module()
    for call in (compiled, exported):
        out = call(ids, attention_mask=MASK)
        assert relative_rmse(out.logits, expected.logits) <= 1e-6
        assert_states_match(out.state, expected.state, 1e-6)
    grads, right = (
        torch.autograd.grad(out.logits.square().sum(), list(model.parameters()))
        for out in (compiled(ids, attention_mask=MASK), expected)
    )
    for (name, _), a, b in zip(model.named_parameters(), grads, right, strict=True):
        assert relative_rmse(a, b) <= 1e-4, name


@pytest.mark.parametrize(
    ("mask", "error", "message"),
    [
        (MASK[:, :-1], ValueError, "attention_mask has shape [6, 8]; it must be [6, 9]"),
        (MASK.view(6, 1, 1, 9), ValueError, "attention_mask has shape [6, 1, 1, 9]; it must be [6, 9]"),
        (MASK.float(), TypeError, "attention_mask is torch.float32; it must be bool, or int64 of 0 and 1"),
        (2 * MASK, ValueError, "attention_mask holds 2; it must hold only 0 and 1"),
        (-MASK, ValueError, "attention_mask holds -1; it must hold only 0 and 1"),
        (MASK.to("meta"), ValueError, "attention_mask is on meta but the tokens are on cpu"),
    ],
    ids=str,
)
def test_an_invalid_mask_is_refused(mask: Tensor, error: type[Exception], message: str) -> None:
    state = RamState.zeros(SMALL, ROWS)
    with pytest.raises(error, match="^" + re.escape(message) + "$"):
        small_model()(tokens(ROWS, LENGTH), state, attention_mask=mask)


@pytest.mark.parametrize("at_once", [1, 7, 2048])
def test_left_padded_prompts_are_continued_as_each_alone(
    kernels: str, at_once: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Read prompts at once, in chunks, and in chunks of one token."""
    model, ids, rows = small_model(conv_layers=2).double(), tokens(ROWS, LENGTH), [0, 3]
    alone = [model.generate(ids[i : i + 1, MASK[i].bool()], 12)[0, -12:] for i in rows]
    monkeypatch.setattr("ramnet.generation.reading.TOKENS_AT_ONCE", at_once)
    said = model.generate(ids[rows], 12, attention_mask=MASK[rows])
    assert torch.equal(said, torch.cat([ids[rows], torch.stack(alone)], dim=1))
    assert len(said[:, LENGTH:].unique()) > 2, "a constant would prove little"


@pytest.mark.parametrize("options", [{"num_beams": 3}, {"repetition_penalty": 3.0}])
def test_padding_does_not_affect_beams_and_penalties(options: dict[str, Any]) -> None:
    model, ids, rows = small_model().double(), tokens(ROWS, LENGTH), [0, 3]
    alone = [model.generate(ids[i : i + 1, MASK[i].bool()], 12, **options)[0, -12:] for i in rows]
    said = model.generate(ids[rows], 12, attention_mask=MASK[rows], **options)
    assert torch.equal(said[:, LENGTH:], torch.stack(alone))


def test_prompts_padded_on_the_right_are_not_continued() -> None:
    model, ids = small_model(), tokens(ROWS, LENGTH)
    with pytest.raises(ValueError, match="attention_mask ends in padding in row 1; pad on the left"):
        model.generate(ids, 3, attention_mask=MASK)
    with pytest.raises(ValueError, match=re.escape("attention_mask has shape [6, 8]; it must be [6, 9]")):
        model.generate(ids, 3, attention_mask=MASK[:, 1:])


@pytest.mark.parametrize("name", ["attention_mask", "cu_seqlens"])
def test_what_is_no_tensor_is_named(name: str) -> None:
    with pytest.raises(TypeError, match=f"^{name} is a list; it must be a tensor$"):
        small_model()(tokens(1, 2), **{name: [1, 1]})
