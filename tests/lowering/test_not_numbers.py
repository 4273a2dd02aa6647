"""Logits with an undefined softmax give NaN on every kernel, and large logits are exact."""

from __future__ import annotations

import math
import os
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

import lowering
from lowering.cpu.backend import CpuKernels
from lowering.cpu.build import lower
from lowering.gpu.backend import GpuKernels
from ramnet import RamNetConfig, RamNetForCausalLM, RamState, ops
from ramnet.ops import reference
from schedules.cpu import AddressDecode
from schedules.gpu import address
from schedules.workload import Op, Workload
from tests.brute_force import keep_largest, product_softmax
from tests.samples import relative_rmse

pytest.importorskip("tvm", reason="the kernels need tvm: pip install 'ramnet[tvm]'")

ROWS = 70
SIZES = [(4, 3, 6), (2, 3, 4), (3, 2, 5)]
Decode = Callable[[Tensor, int], tuple[Tensor, Tensor]]


class Scheduled(CpuKernels):
    """The CPU's kernels with one schedule for all workloads."""

    def __init__(self, schedule: AddressDecode) -> None:
        super().__init__()
        self.given = schedule

    def kernel(self, op: Op, sizes: tuple[int, ...], dtype: torch.dtype, **constants: float) -> Any:
        return lower(Workload.of(op, sizes, dtype, constants), "cpu", self.given)


def on_cpu(lanes: int, unroll: int) -> Decode:
    backend = Scheduled(AddressDecode(lanes=lanes, unroll=unroll, parallel=False))

    def decode(logits: Tensor, top_k: int) -> tuple[Tensor, Tensor]:
        many = logits.repeat(4, 1, 1)  # code is unrolled only for many rows
        slots, weights = backend.address_decode(many, top_k)
        return slots[: len(logits)], weights[: len(logits)]

    return decode


def on_gpu(compiler: str, unroll: int) -> Decode:
    pytest.importorskip("triton", reason="the GPU kernels need triton: pip install 'ramnet[gpu]'")
    schedule = address.AddressDecode(compiler=compiler, threads=64, unroll=unroll)  # type: ignore[arg-type]
    return GpuKernels("h100", given={"address_decode": schedule}).address_decode


DECODERS = {
    **{f"cpu, unroll {unroll}": lambda unroll=unroll: on_cpu(8, unroll) for unroll in (0, 1, 2)},
    **{
        f"{compiler}, unroll {unroll}": lambda compiler=compiler, unroll=unroll: on_gpu(compiler, unroll)
        for compiler in ("triton", "tir") for unroll in (0, 2)
    },
}  # fmt: skip


@pytest.fixture(params=DECODERS.values(), ids=DECODERS.keys())
def decode(request: pytest.FixtureRequest) -> Decode:
    if "cpu" not in request.node.callspec.id and "TRITON_INTERPRET" not in os.environ:
        pytest.skip("Triton's kernels are interpreted here")
    return request.param()


def draw(order: int, sub_dim: int) -> Tensor:
    return torch.randn(ROWS, order, sub_dim, generator=torch.Generator().manual_seed(0))


@pytest.mark.filterwarnings("ignore:invalid value encountered")
@pytest.mark.parametrize(("order", "sub_dim", "top_k"), SIZES)
def test_an_undefined_softmax_gives_weights_of_nan_and_valid_slots(
    order: int, sub_dim: int, top_k: int, decode: Decode
) -> None:
    logits = draw(order, sub_dim)
    logits[0:5, -1, -1] = math.nan
    logits[5:10, 0, 0] = math.nan
    logits[10:15, -1, 0] = math.inf
    logits[15:20, 0] = -math.inf
    logits[20:25] = math.nan
    logits[25:30, order // 2, 1:] = -math.inf  # -inf excludes digits, as long as one is left
    if sub_dim * (order - 1) < top_k:
        logits[25:30] = draw(order, sub_dim)[25:30]
    slots, weights = decode(logits, top_k)
    refused = torch.arange(ROWS) < 25
    assert torch.equal(weights.isnan().all(-1), refused)
    assert torch.equal(weights.isnan().any(-1), refused)
    assert int(slots.min()) >= 0 and int(slots.max()) < sub_dim**order
    ordered = slots.sort(-1).values
    assert bool((ordered[:, 1:] != ordered[:, :-1]).all()), "a slot stands twice"
    expected = keep_largest(product_softmax(logits[~refused]), top_k).sort(-1, descending=True).values[:, :top_k]
    assert relative_rmse(weights[~refused], expected) < 1e-5


@pytest.mark.parametrize("scale", [1e2, 1e4, 1e7, 1e20])
@pytest.mark.parametrize(("order", "sub_dim", "top_k"), SIZES)
def test_large_logits_are_exact(order: int, sub_dim: int, top_k: int, scale: float, decode: Decode) -> None:
    """Weights depend on differences of logits, which are exact; sums over sub-vectors would be rounded."""
    logits = scale + draw(order, sub_dim)
    _, weights = decode(logits, top_k)
    expected = keep_largest(product_softmax(logits), top_k).sort(-1, descending=True).values[:, :top_k]
    assert relative_rmse(weights, expected) < 1e-6


@pytest.mark.parametrize(("order", "sub_dim", "top_k"), SIZES)
def test_the_gradient_of_nan_is_nan(order: int, sub_dim: int, top_k: int) -> None:
    logits = draw(order, sub_dim)
    slots, weights = reference.address_decode(logits, top_k)
    logits[3:6, 0, 0] = math.nan
    grad = CpuKernels().address_decode_backward(torch.ones_like(weights), logits, slots, weights)
    assert torch.equal(grad[:, 0].isnan().all(-1), (torch.arange(ROWS) >= 3) & (torch.arange(ROWS) < 6))


@pytest.mark.parametrize("where", ["log_scale", "query_key_value", "mixer_norm", "embedding"])
def test_a_nan_in_a_model_appears_in_its_logits_and_gradients(where: str) -> None:
    torch.manual_seed(0)
    config = RamNetConfig(vocab_size=37, hidden_size=18, num_layers=2, num_heads=3, value_dim=7, order=3, sub_dim=3,
                          top_k=4, cape_full_layers=1, intermediate_size=29)  # fmt: skip
    model = RamNetForCausalLM(config)
    spoilt = next(parameter for name, parameter in model.named_parameters() if where in name)
    with torch.no_grad():
        spoilt.view(-1)[0] = math.nan
    ids = torch.zeros(1, 9, dtype=torch.int64)
    with ops.using("cpu"):
        loss = model(ids).logits.square().mean()
        loss.backward()
    assert loss.isnan()
    assert all(parameter.grad.isnan().any() for name, parameter in model.named_parameters() if "blocks.0.mixer" in name)
    fast, state = lowering.compile(model, backend="eager"), RamState.zeros(config, 1)
    with torch.no_grad():
        assert fast(ids[:, :1], state, in_place=True).logits.isnan().any()
        assert fast(ids).logits.isnan().any()
