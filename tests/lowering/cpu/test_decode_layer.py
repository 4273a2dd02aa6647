"""One token in one kernel per layer equals the eager model, and updates the state in place."""

from __future__ import annotations

from typing import Any

import pytest
import torch

import lowering
from lowering.cpu.backend import CpuKernels
from ramnet import RamNetConfig, RamNetForCausalLM, RamState
from schedules.cpu import DecodeLayer
from schedules.workload import Workload
from tests.samples import relative_rmse

pytest.importorskip("tvm", reason="the CPU kernels need tvm: pip install 'ramnet[tvm]'")

SMALL = {
    "vocab_size": 37, "hidden_size": 18, "num_layers": 2, "num_heads": 3, "value_dim": 7, "order": 3, "sub_dim": 3,
    "top_k": 4, "intermediate_size": 29,
}  # fmt: skip
CAPE_FULL, CAPE_HALF = {"cape_full_layers": 2}, {"cape_half_layers": 2}


def model(**fields: Any) -> RamNetForCausalLM:
    torch.manual_seed(0)
    made = RamNetForCausalLM(RamNetConfig(**{**SMALL, **fields}))
    with torch.no_grad():
        for name, parameter in made.named_parameters():
            if "norm" in name or "log_scale" in name:  # the initial ones and zeros would hide mistakes
                parameter.add_(torch.randn_like(parameter), alpha=0.3)
    return made


def layers_run(monkeypatch: pytest.MonkeyPatch) -> list[tuple[int, ...]]:
    """Record the shapes that are passed to the kernel."""
    seen, run = [], CpuKernels.decode_layer

    def noted(self: CpuKernels, x: torch.Tensor, *rest: Any) -> torch.Tensor:
        seen.append(tuple(x.shape))
        return run(self, x, *rest)

    monkeypatch.setattr(CpuKernels, "decode_layer", noted)
    return seen


def by_layer(model: RamNetForCausalLM) -> Any:
    """Compile a model, without the library that computes whole tokens."""
    fast: Any = lowering.compile(model)
    fast.token = None
    return fast


@torch.no_grad()
def assert_equal_steps(
    eager: RamNetForCausalLM, batch: int = 1, start: int = 0, dtype: torch.dtype = torch.float32
) -> None:
    fast = by_layer(eager)
    expected, state = (RamState.zeros(eager.config, batch, dtype=dtype) for _ in range(2))
    expected.position += start
    state.position += start
    tensors = state.tensors()
    ids = torch.randint(0, SMALL["vocab_size"], (20, batch, 1), generator=torch.Generator().manual_seed(1))
    for token in ids:
        want = eager(token, expected, in_place=True).logits
        got = fast(token, state, in_place=True)
        assert relative_rmse(got.logits, want) < 1e-5
        assert got.state is state
    for name, tensor in state.tensors().items():
        assert tensor is tensors[name]
        assert relative_rmse(tensor, expected.tensors()[name]) < 1e-5, name


@pytest.mark.parametrize(
    "fields",
    [
        {}, {"intermediate_size": 0}, {"conv_layers": 1}, CAPE_FULL, CAPE_HALF, {"decay_power": 0.5},
        {"decay_power": 2.0}, {"top_k": 1}, {"top_k": 27}, {"num_heads": 1, "value_dim": 1, "hidden_size": 1},
        {"temperature": 0.7, "eps": 1e-2, "norm_eps": 1e-2}, {"num_heads": 20, **CAPE_HALF},
    ],
    ids=str,
)  # fmt: skip
def test_equals_the_eager_model_token_by_token(fields: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    seen = layers_run(monkeypatch)
    eager = model(**fields)
    assert_equal_steps(eager)
    assert seen == [(1, 1, eager.config.hidden_size)] * 40


@pytest.mark.parametrize("start", [26, 1000, 2**31 - 3, 2**40 + 5])
@pytest.mark.parametrize("fields", [CAPE_FULL, CAPE_HALF], ids=str)
def test_cape_is_exact_at_any_position(fields: dict[str, Any], start: int) -> None:
    assert_equal_steps(model(**fields), start=start)


def test_a_batch_does_not_use_the_kernel(monkeypatch: pytest.MonkeyPatch) -> None:
    seen = layers_run(monkeypatch)
    assert_equal_steps(model(**CAPE_HALF), batch=2)
    assert seen == []


def test_another_dtype_does_not_use_the_kernel(monkeypatch: pytest.MonkeyPatch) -> None:
    seen = layers_run(monkeypatch)
    assert_equal_steps(model().double(), dtype=torch.float64)
    assert seen == []


@torch.no_grad()
def test_weights_changed_after_compiling_are_used() -> None:
    eager = model()
    fast, token = by_layer(eager), torch.tensor([[3]])
    fast(token, in_place=True)
    eager.load_state_dict({name: 1.1 * x for name, x in eager.state_dict().items()})
    assert relative_rmse(fast(token, in_place=True).logits, eager(token, in_place=True).logits) < 1e-5


@pytest.mark.parametrize(("rows", "lanes"), [(1, 128), (2, 8), (3, 64), (4, 16), (4, 32)])
def test_every_value_of_every_knob_computes_the_same(rows: int, lanes: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(DecodeLayer, "default", classmethod(lambda cls, _: cls(rows=rows, lanes=lanes)))
    eager = model(hidden_size=10 * rows)
    values = DecodeLayer.space(Workload(op="decode_layer", shape=dict.fromkeys("CHUPKMDI", 2)))
    assert lanes in values["lanes"] and (rows in values["rows"] or rows == 3)
    assert_equal_steps(eager)


def test_a_schedule_without_rows_is_refused() -> None:
    work = Workload(op="decode_layer", shape=dict.fromkeys("CHUPKMDI", 2))
    assert DecodeLayer(rows=0, lanes=8).refusal(work) == "rows is 0; it must be at least 1"
    assert "they must be in" in str(DecodeLayer(rows=1, lanes=256).refusal(work))
