"""A compiled model works with functional_call, gradients, subclasses, copies, default dtypes and inference mode."""

from __future__ import annotations

import copy
import io

import pytest
import torch
from torch import Tensor

import lowering
import ramnet
from lowering.aot.library import Library
from ramnet import RamNetForCausalLM, RamState
from tests.lowering.compiled.models import CONFIG, adapt, assert_alike, fresh, ids, outputs
from tests.samples import relative_rmse

pytest.importorskip("tvm", reason="the CPU kernels need tvm: pip install 'ramnet[tvm]'")


def test_functional_call_takes_the_weights_it_is_given(fast: RamNetForCausalLM) -> None:
    other = fresh(seed=1)
    given = {name: x.detach() for name, x in other.named_parameters()}
    state, right = RamState.zeros(CONFIG, 1), RamState.zeros(CONFIG, 1)
    with torch.no_grad():
        for seed in range(3):
            token = ids(1, 1, seed)
            got = torch.func.functional_call(fast, given, (token, state), {"in_place": True}).logits
            assert relative_rmse(got, other(token, right, in_place=True).logits) < 1e-5
        assert (
            relative_rmse(torch.func.functional_call(fast, given, (ids(1, 9),)).logits, other(ids(1, 9)).logits) < 1e-5
        )


@pytest.mark.parametrize("adapted", [False, True])
def test_gradients_equal_those_of_the_model(adapted: bool, model: RamNetForCausalLM, fast: RamNetForCausalLM) -> None:
    if adapted:
        adapt("blocks.1.mixer.query_key_value")(model)

    def gradients(call: RamNetForCausalLM) -> dict[str, Tensor]:
        model.zero_grad()
        call(ids(2, 19)).logits.square().mean().backward()
        return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}

    got, expected = gradients(fast), gradients(model)
    assert got.keys() == expected.keys()
    assert all(relative_rmse(got[name], expected[name]) < 1e-4 for name in expected)


@pytest.mark.parametrize("hooked", [False, True])
def test_a_backward_pass_that_needs_the_state_before_a_token_is_an_error(
    hooked: bool, model: RamNetForCausalLM, fast: RamNetForCausalLM
) -> None:
    """The token by the library, or by its blocks."""
    if hooked:
        model.norm.register_forward_hook(lambda *_: None)
    with torch.no_grad():
        state = fast(ids(1, 3)).state
    loss = fast(ids(1, 3), state).logits.sum()
    with torch.no_grad():
        fast(ids(1, 1), state, in_place=True)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


def test_a_configuration_that_is_replaced_is_the_compiled_models() -> None:
    model = fresh()
    fast = lowering.compile(model, backend="eager")
    assert fast.config is model.config
    model.config = CONFIG.model_copy(update={"vocab_size": 70})
    model.embedding, model.head = torch.nn.Embedding(70, 24), torch.nn.Linear(24, 70, bias=False)
    prompt = torch.full((1, 3), 69)
    assert_alike(fast, model)
    assert torch.equal(fast.generate(prompt, 4, num_beams=2), model.generate(prompt, 4, num_beams=2))


def test_methods_that_a_subclass_overrides_are_called() -> None:
    class Doubled(RamNetForCausalLM):
        def forward(self, *args: object, **options: object):
            out = super().forward(*args, **options)
            return out._replace(logits=2 * out.logits)

    torch.manual_seed(0)
    model = Doubled(CONFIG)
    fast = lowering.compile(model, backend="eager")
    assert isinstance(fast, Doubled)
    assert_alike(fast, model)


class SteeredBlock(RamNetForCausalLM):
    def run_block(self, block: torch.nn.Module, x: Tensor, *state: object):
        if block is self.blocks[1] and block.mixer.cape_heads:
            x = x + torch.linspace(-3, 3, x.shape[-1])
        return super().run_block(block, x, *state)


class SteeredConv(RamNetForCausalLM):
    def run_conv(self, conv: torch.nn.Module, x: Tensor, *state: object):
        y, recent = super().run_conv(conv, x, *state)
        return 2 * y, recent


class ScaledHead(RamNetForCausalLM):
    scale = 3.0
    token, kernels = 1.0, 0.5  # names that a compiled model may not take

    def run_head(self, hidden: Tensor) -> Tensor:
        kept = torch.zeros_like(hidden) if self.training else hidden
        return super().run_head(kept) * self.scale * self.token * self.kernels


@pytest.mark.parametrize("kind", [SteeredBlock, SteeredConv, ScaledHead])
def test_parts_of_the_model_that_a_subclass_runs_otherwise_are_run_so(kind: type[RamNetForCausalLM]) -> None:
    torch.manual_seed(0)
    model = kind(CONFIG)
    fast = lowering.compile(model, backend="eager")
    assert relative_rmse(outputs(model), outputs(fresh())) > 1e-3
    assert_alike(fast, model)


def test_settings_of_the_model_that_change_later_are_the_compiled_models() -> None:
    model = ScaledHead(CONFIG)
    fast = lowering.compile(model, backend="eager")
    assert not outputs(fast).any() and fast.training
    model.eval()
    assert not fast.training
    model.scale = 0.5
    assert_alike(fast, model)
    fast.train()
    assert model.training
    seen: list[object] = []
    model.register_full_backward_hook(lambda *_: seen.append(1))
    fast(ids(1, 3)).logits.sum().backward()
    assert seen == [1]


@pytest.mark.parametrize("before", [True, False])
@pytest.mark.parametrize("name", ["run_head", "forward"])
def test_a_method_that_is_set_on_the_model_is_called(name: str, before: bool) -> None:
    model = fresh()
    fast = None if before else lowering.compile(model, backend="eager")
    inner = getattr(model, name)
    doubled = {
        "run_head": lambda hidden: 2 * inner(hidden),
        "forward": lambda *given, **named: (out := inner(*given, **named))._replace(logits=2 * out.logits),
    }
    setattr(model, name, doubled[name])
    called: list[object] = []
    model.register_forward_hook(lambda *_: called.append(1))
    assert relative_rmse(outputs(model), outputs(fresh())) > 0.1
    fast = fast or lowering.compile(model, backend="eager")
    assert_alike(fast, model)
    called.clear()
    fast(ids(1, 1))
    assert called == [1], "a hook is called once"


def test_a_method_that_computes_nothing_may_be_set_on_the_model(monkeypatch: pytest.MonkeyPatch) -> None:
    made: list[int] = []
    run = Library.step
    monkeypatch.setattr(Library, "step", lambda self, *given: (made.append(1), run(self, *given))[1])
    model = fresh()
    model.to = model.to
    model.generate = lambda *_, **__: "its own"
    fast = lowering.compile(model, backend="eager")
    assert fast.generate(ids(1, 2)) == "its own"
    with torch.no_grad():
        fast(ids(1, 1))
    assert made == [1]


def test_a_forward_with_other_arguments_is_called_with_them() -> None:
    class Loss(RamNetForCausalLM):
        def forward(self, input_ids: Tensor, labels: Tensor | None = None):
            logits = super().forward(input_ids).logits
            return logits if labels is None else torch.nn.functional.cross_entropy(logits.mT, labels)

    torch.manual_seed(0)
    model, prompt = Loss(CONFIG), ids(2, 5)
    fast = lowering.compile(model, backend="eager")
    for call in (fast, model):
        call.losses = [call(prompt, prompt), call(prompt, labels=prompt), call(prompt).mean()]
    torch.testing.assert_close(fast.losses, model.losses)


@pytest.mark.parametrize("length", [1, 40])
@torch.no_grad()
def test_autocast_gives_logits_of_its_dtype(length: int, model: RamNetForCausalLM, fast: RamNetForCausalLM) -> None:
    with torch.autocast("cpu", torch.bfloat16):
        got, want = fast(ids(1, length)).logits, model(ids(1, length)).logits
    assert got.dtype == want.dtype == torch.bfloat16 and relative_rmse(got, want) < 3e-2


@pytest.mark.parametrize("how", ["deepcopy", "pickle", "twice"])
def test_copies_are_compiled_models_with_their_own_weights(how: str, fast: RamNetForCausalLM) -> None:
    expected = outputs(fast)
    if how == "deepcopy":
        again = copy.deepcopy(fast)
    elif how == "pickle":
        file = io.BytesIO()
        torch.save(fast, file)
        file.seek(0)
        again = torch.load(file, weights_only=False)
    else:
        again = lowering.compile(fast, backend="eager")
    assert type(again).__name__ == type(fast).__name__
    assert torch.equal(outputs(again), expected)
    with torch.no_grad():
        again.head.weight.zero_()
    assert torch.equal(outputs(fast), expected) == (how != "twice")


@pytest.mark.parametrize("default", [torch.float64, torch.bfloat16])
def test_the_default_dtype_does_not_change_results(
    default: torch.dtype, model: RamNetForCausalLM, fast: RamNetForCausalLM
) -> None:
    expected = outputs(fast), outputs(model), fast.generate(ids(1, 5), 6)
    torch.set_default_dtype(default)
    try:
        assert torch.equal(outputs(fast), expected[0])
        assert torch.equal(outputs(model), expected[1])
        assert torch.equal(fast.generate(ids(1, 5), 6), expected[2])
    finally:
        torch.set_default_dtype(torch.float32)


@torch.no_grad()
def test_positions_in_int32_are_taken_by_every_path(model: RamNetForCausalLM, fast: RamNetForCausalLM) -> None:
    for batch in (1, 2):
        narrow, wide = (model(ids(batch, 7)).state for _ in range(2))
        narrow.position = narrow.position.to(torch.int32)
        for seed in range(3):
            token = ids(batch, 1, seed)
            expected = model(token, wide, in_place=True).logits
            assert relative_rmse(fast(token, narrow, in_place=True).logits, expected) < 1e-5
        assert narrow.position.tolist() == [10] * batch


@pytest.mark.parametrize("compiled", [False, True])
def test_an_inference_state_outside_of_inference_mode_is_refused_before_anything_is_written(
    compiled: bool, model: RamNetForCausalLM, fast: RamNetForCausalLM
) -> None:
    step = fast if compiled else model
    with torch.inference_mode():
        state = step(ids(1, 7)).state
        before = state.clone()
    with torch.no_grad(), pytest.raises(ValueError, match=r"state\.memory\[0\] was made in torch\.inference_mode\(\)"):
        step(ids(1, 1), state, in_place=True)
    for name, tensor in state.tensors().items():
        assert torch.equal(tensor, before.tensors()[name]), name
    with torch.inference_mode():
        expected = step(ids(1, 1), before, in_place=True).logits
    with torch.no_grad():
        assert torch.equal(step(ids(1, 1), state.clone(), in_place=True).logits, expected)


def test_what_is_not_a_model_is_named() -> None:
    for call in (lowering.compile, lambda model: ramnet.trace(model, ids(1, 2))):
        with pytest.raises(TypeError, match=r"^model is a Linear; it must be a RamNetForCausalLM$"):
            call(torch.nn.Linear(2, 2))
