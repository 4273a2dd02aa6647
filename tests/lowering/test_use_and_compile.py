"""``lowering.use`` and ``lowering.compile`` equal the reference in inference and training."""

from __future__ import annotations

import importlib.util
import subprocess
import sys
import warnings

import pytest
import torch

import lowering
from ramnet import RamNetConfig, RamNetForCausalLM, ops
from tests.samples import relative_rmse

needs_tvm = pytest.mark.skipif(importlib.util.find_spec("tvm") is None, reason="the CPU kernels need tvm")


@pytest.fixture(scope="module")
def model() -> RamNetForCausalLM:
    torch.manual_seed(0)
    return RamNetForCausalLM(
        RamNetConfig(
            vocab_size=61, hidden_size=24, num_layers=1, num_heads=2, value_dim=12, order=3, sub_dim=3, top_k=4,
            cape_half_layers=1, intermediate_size=40, conv_layers=1, decay_power=2.0,
        )
    )  # fmt: skip


def ids(batch: int, tokens: int) -> torch.Tensor:
    return torch.randint(0, 61, (batch, tokens), generator=torch.Generator().manual_seed(1))


def gradients(model: RamNetForCausalLM, call: RamNetForCausalLM) -> list[torch.Tensor]:
    model.zero_grad()
    call(ids(2, 19)).logits.square().mean().backward()
    return [p.grad.clone() for p in model.parameters() if p.grad is not None]


@needs_tvm
def test_use_gives_the_references_numbers_and_gradients(model: RamNetForCausalLM) -> None:
    expected, expected_gradients = model(ids(2, 19)).logits, gradients(model, model)
    with lowering.use("cpu"):
        assert relative_rmse(model(ids(2, 19)).logits, expected) < 1e-5
        got = gradients(model, model)
    assert all(relative_rmse(a, b) < 1e-4 for a, b in zip(got, expected_gradients, strict=True))


@needs_tvm
def test_backward_stays_on_the_kernels_of_its_forward(
    model: RamNetForCausalLM, monkeypatch: pytest.MonkeyPatch
) -> None:
    with lowering.use("cpu"):
        loss = model(ids(1, 5)).logits.sum()
    monkeypatch.setattr("ramnet.ops.reference.memory_scan_backward", None)
    loss.backward()


@needs_tvm
def test_check_refuses_what_the_reference_refuses() -> None:
    slots = torch.tensor([[[[0, 0]]]], dtype=torch.int32)
    inputs = (slots, torch.rand(1, 1, 1, 2), slots, torch.rand(1, 1, 1, 2), torch.rand(1, 1, 1, 3),
              torch.rand(1, 1, 4, 3), torch.rand(1, 1, 4))  # fmt: skip
    for name, at in (("write_slots", 0), ("read_slots", 2)):
        good = [torch.tensor([[[[3, 1]]]], dtype=torch.int32) if i in (0, 2) else x for i, x in enumerate(inputs)]
        with lowering.use("cpu", check=True):
            ops.memory_scan(*good)
            good[at] = slots
            with pytest.raises(ValueError, match=rf"{name}\[0, 0, 0\] holds slot 0 twice"):
                ops.memory_scan(*good)
    with lowering.use("cpu", check=True), pytest.raises(ValueError, match="it must be finite"):
        ops.address_decode(torch.full((1, 2, 2), torch.nan), 1)


@needs_tvm
def test_compiled_model_equals_eager_in_prefill_decode_training_and_generation(model: RamNetForCausalLM) -> None:
    expected, expected_gradients = model(ids(2, 19)).logits, gradients(model, model)
    compiled = lowering.compile(model, backend="aot_eager")
    assert relative_rmse(compiled(ids(2, 19)).logits, expected) < 1e-5
    got = gradients(model, compiled)
    assert all(relative_rmse(a, b) < 1e-4 for a, b in zip(got, expected_gradients, strict=True))
    assert torch.equal(compiled.generate(ids(2, 5), 6), model.generate(ids(2, 5), 6))
    assert compiled(ids(2, 5), logits_to_keep=2).logits.shape == (2, 2, 61)
    assert all(a is b for a, b in zip(compiled.parameters(), model.parameters(), strict=True))
    assert list(compiled.state_dict()) == list(model.state_dict())


@needs_tvm
def test_generated_code_equals_eager() -> None:
    torch.manual_seed(0)
    small = RamNetForCausalLM(
        RamNetConfig(vocab_size=61, hidden_size=24, num_layers=1, num_heads=2, value_dim=12, order=3, sub_dim=3,
                     top_k=4, decay_power=2.0)
    )  # fmt: skip
    compiled = lowering.compile(small)
    expected = gradients(small, small)
    got = gradients(small, compiled)
    assert all(relative_rmse(a, b) < 1e-4 for a, b in zip(got, expected, strict=True))


def test_unknown_target_is_refused_with_those_known(model: RamNetForCausalLM) -> None:
    with pytest.raises(ValueError, match=r"target 'abacus' is unknown; there are .*cpu"):
        lowering.compile(model, target="abacus")
    with pytest.raises(ValueError, match="target 'abacus' is unknown"), lowering.use("abacus"):
        pass


def test_without_tvm_the_reference_runs_and_one_notice_says_what_is_missing(monkeypatch: pytest.MonkeyPatch) -> None:
    from lowering.backends import backend_name
    from lowering.cpu import runtime

    def absent(name: str) -> None:
        return None if name.startswith("tvm") else importlib.util.find_spec(name)

    monkeypatch.setattr(runtime.importlib.util, "find_spec", absent)
    runtime._ffi.cache_clear()
    monkeypatch.setattr(runtime, "_pool", runtime._Pool())
    backend_name.cache_clear()
    try:
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            for _ in range(2):
                with lowering.use("cpu"):
                    assert ops.address_decode(torch.zeros(2, 2), 1)[1].item() == pytest.approx(0.25)
        assert [str(w.message) for w in caught if "apache-tvm" in str(w.message)] == [
            "the TVM kernels need apache-tvm, which is not installed: pip install 'ramnet[tvm]';"
            " running the plain PyTorch reference instead"
        ]
    finally:
        runtime._ffi.cache_clear()
        backend_name.cache_clear()


def test_importing_the_packages_imports_no_heavy_library() -> None:
    heavy = ("tvm", "tvm_ffi", "onnx", "onnxruntime", "optuna", "matplotlib", "triton")
    code = f"import ramnet, schedules, lowering, autotune, export, sys; print([m for m in {heavy} if m in sys.modules])"
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    assert out.strip() == "[]"
