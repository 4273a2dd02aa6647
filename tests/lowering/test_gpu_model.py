"""``lowering.use`` and ``lowering.compile`` for a GPU equal the reference, on the GPU or interpreted."""

from __future__ import annotations

import importlib.util
import warnings
from collections.abc import Iterator
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

import lowering
from lowering import backends, targets
from lowering.gpu import backend as gpu_backend
from ramnet import RamNetConfig, RamNetForCausalLM, RamState, ops
from tests.samples import relative_rmse

needs_triton = pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="the GPU kernels need triton")
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


@pytest.fixture(autouse=True)
def fresh() -> Iterator[None]:
    """Create backends anew in each test, with their warnings."""
    backends.backend_name.cache_clear()
    yield
    backends.backend_name.cache_clear()


def model_with(cape_heads: str) -> RamNetForCausalLM:
    """One layer, to save the interpreter's time, with CAPE in all or half of the heads."""
    torch.manual_seed(0)
    model = RamNetForCausalLM(
        RamNetConfig(
            vocab_size=17, hidden_size=16, num_layers=1, num_heads=2, value_dim=6, order=2, sub_dim=3, top_k=3,
            intermediate_size=24, conv_layers=1, decay_power=2.0, address_bias="offsets",
            cape_full_layers=int(cape_heads == "all"), cape_half_layers=int(cape_heads == "half"),
        )
    )  # fmt: skip
    with torch.no_grad():
        model.blocks[0].mixer.log_scale.uniform_(-0.5, 0.5)
    return model.to(DEVICE)


def ids(batch: int, tokens: int) -> Tensor:
    return torch.randint(0, 17, (batch, tokens), generator=torch.Generator().manual_seed(1)).to(DEVICE)


def loss_and_gradients(call: Any, model: RamNetForCausalLM) -> list[Tensor]:
    model.zero_grad()
    text = ids(2, 6)
    loss = F.cross_entropy(call(text[:, :-1]).logits.flatten(0, 1), text[:, 1:].flatten())
    loss.backward()
    return [loss.detach(), *(p.grad.clone() for p in model.parameters() if p.grad is not None)]


@needs_triton
@pytest.mark.parametrize("cape", ["all", "half"])
def test_training_step_equals_the_references(cape: str) -> None:
    model = model_with(cape)
    compiled = lowering.compile(model, target="h200", backend="aot_eager")
    expected = loss_and_gradients(model, model)
    got = loss_and_gradients(compiled, model)
    assert compiled._kernels == "h200"
    assert all(relative_rmse(a, b) < 1e-4 for a, b in zip(got, expected, strict=True))


@needs_triton
@torch.no_grad()
@pytest.mark.parametrize("cape", ["all", "half"])
def test_prefill_then_tokens_equal_the_references(cape: str) -> None:
    model = model_with(cape)
    compiled = lowering.compile(model, target="h200", backend="eager")
    text = ids(2, 7)
    whole = model(text)
    out = compiled(text[:, :4])
    assert relative_rmse(out.logits, whole.logits[:, :4]) < 1e-5
    state = out.state
    for t in range(4, 7):
        out = compiled(text[:, t : t + 1], state, in_place=True)
        assert out.state is state
        assert relative_rmse(out.logits[:, 0], whole.logits[:, t]) < 1e-5
    assert DEVICE == "cpu" or len(compiled._graphs._recorded) == 1  # all of them replayed from one CUDA graph
    theirs = whole.state.tensors()
    assert all(relative_rmse(x, theirs[name]) < 1e-5 for name, x in state.tensors().items())


@needs_triton
def test_the_whole_model_trains_in_one_graph_on_the_kernels() -> None:
    torch.compiler.reset()
    model = model_with("half")
    expected = loss_and_gradients(model, model)
    with lowering.use("h200"):
        got = loss_and_gradients(torch.compile(model, fullgraph=True, backend="aot_eager"), model)
    assert all(relative_rmse(a, b) < 1e-4 for a, b in zip(got, expected, strict=True))


@needs_triton
def test_bfloat16_weights_train_and_decode_on_a_float32_state() -> None:
    model = model_with("half").bfloat16()
    compiled = lowering.compile(model, target="h200", backend="aot_eager")
    for actual, expected in zip(*(loss_and_gradients(call, model) for call in (compiled, model)), strict=True):
        assert actual.dtype == torch.bfloat16
        assert relative_rmse(actual, expected) < 0.05
    with torch.no_grad():
        text = ids(2, 3)
        whole, state = model(text), RamState.zeros(model.config, 2, device=DEVICE)
        for t in range(3):
            logits = compiled(text[:, t : t + 1], state, in_place=True).logits
            assert logits.dtype == torch.bfloat16
            assert relative_rmse(logits[:, 0], whole.logits[:, t]) < 0.05
    assert {x.dtype for x in (*state.memory, *state.mass)} == {torch.float32}


@needs_triton
def test_autocast_trains_on_float32_weights_and_bfloat16_values() -> None:
    model = model_with("half")
    expected = loss_and_gradients(model, model)
    with lowering.use("h200"), torch.autocast(DEVICE, dtype=torch.bfloat16):
        got = loss_and_gradients(model, model)
    assert float(got[0]) == pytest.approx(float(expected[0]), rel=0.02)
    assert all(bool(x.isfinite().all()) for x in got)


@needs_triton
@torch.no_grad()
def test_generation_equals_the_references() -> None:
    model = model_with("all")
    compiled = lowering.compile(model, target="h200", backend="eager")
    assert torch.equal(compiled.generate(ids(1, 3), 3), model.generate(ids(1, 3), 3))


@needs_triton
def test_launches_go_to_the_device_of_the_tensors(monkeypatch: pytest.MonkeyPatch) -> None:
    """Triton launches on the current GPU, which may differ from the model's."""
    entered: list[Tensor] = []
    device_of = torch.cuda.device_of
    monkeypatch.setattr(torch.cuda, "device_of", lambda x: entered.append(x) or device_of(x))
    logits = torch.zeros(1, 2, 3, device=DEVICE)
    with lowering.use("h200"):
        ops.address_decode(logits, 1)
    assert [x.device for x in entered] == [logits.device]


def gpu_is(monkeypatch: pytest.MonkeyPatch, name: str | None) -> None:
    for module in (backends, gpu_backend):
        monkeypatch.setattr(module, "here", lambda: name and targets.find(name))


def test_a_gpu_target_without_a_gpu_is_refused_with_an_alternative(monkeypatch: pytest.MonkeyPatch) -> None:
    gpu_is(monkeypatch, None)
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    message = r"no GPU here, so nothing can run for target 'h200'; `ramnet tune --target h200` compiles for it"
    with pytest.raises(RuntimeError, match=message), lowering.use("h200"):
        pass
    with pytest.raises(RuntimeError, match="there is no GPU here for the backend 'gpu'"):
        backends.gpu_backend()


@pytest.mark.parametrize(("value", "asked"), [("1", True), ("TRUE", True), ("on", True), ("0", False), ("", False)])
def test_kernels_are_interpreted_where_triton_is_asked_to(
    value: str, asked: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TRITON_INTERPRET", value)
    assert backends.interpreted() == asked


@needs_triton
def test_another_gpu_than_the_named_one_runs_its_schedules_with_one_notice(monkeypatch: pytest.MonkeyPatch) -> None:
    gpu_is(monkeypatch, "mi300x")
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        for _ in range(2):
            with lowering.use("h200"):
                kernels: Any = ops.registered("h200")
    assert [str(w.message) for w in caught] == [
        "the GPU here is AMD Instinct MI300X; it runs with the schedules of h200"
    ]
    assert (kernels.target, kernels.gpu.warp) == ("h200", 64)


@needs_triton
def test_the_backend_gpu_is_this_machines_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    gpu_is(monkeypatch, "l4")
    monkeypatch.setattr("ramnet.ops.backend._backends", {})
    with ops.using("gpu"):
        kernels: Any = ops.registered("gpu")
    assert (kernels.target, kernels.tuned, kernels.check) == ("l4", True, False)


def test_without_triton_the_reference_runs_and_one_notice_says_what_is_missing(monkeypatch: pytest.MonkeyPatch) -> None:
    gpu_is(monkeypatch, "h200")
    found = importlib.util.find_spec
    monkeypatch.setattr(backends.importlib.util, "find_spec", lambda name: None if name == "triton" else found(name))
    model = model_with("half")
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        compiled = lowering.compile(model, target="h200") if DEVICE == "cuda" else None
        for _ in range(2):
            with lowering.use("h200"):
                assert ops.address_decode(torch.zeros(2, 2), 1)[1].item() == pytest.approx(0.25)
    assert [str(w.message) for w in caught] == [
        "the GPU kernels need triton, which is not installed: pip install 'ramnet[gpu]';"
        " running the plain PyTorch reference instead"
    ]
    assert compiled is None or relative_rmse(compiled(ids(2, 5)).logits, model(ids(2, 5)).logits) < 1e-5


def test_a_model_on_another_device_than_the_target_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    compiled = importlib.import_module("lowering.compiled")
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    monkeypatch.setattr(compiled.torch.cuda, "is_available", lambda: True)
    with pytest.raises(ValueError, match="the model is on cpu but target 'h200' runs on cuda: move it there first"):
        lowering.compile(model_with("all").cpu(), target="h200")


def test_the_default_target_is_that_of_the_models_device(monkeypatch: pytest.MonkeyPatch) -> None:
    compiled = importlib.import_module("lowering.compiled")
    monkeypatch.setattr(compiled.targets, "here", lambda: targets.find("l4"))
    assert compiled._target(model_with("all").cpu(), None).name == "cpu"
    if DEVICE == "cuda":
        assert compiled._target(model_with("all"), None).name == "l4"
