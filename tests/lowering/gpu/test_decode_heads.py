"""decode_heads in Triton against the paper's steps on dense addresses."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from triton.runtime.interpreter import InterpreterBuilder

from lowering.gpu import races as ordering
from lowering.gpu.compilers import interpreted
from lowering.gpu.decode_heads import triton as decode_heads
from lowering.targets import Gpu
from schedules.gpu.step import DecodeHeads
from tests.decode_heads import EPS, POWER, TEMPERATURE, Sizes, expected, random_inputs
from tests.lowering.gpu.compiled import ARCHITECTURES, compile_plan
from tests.samples import TOLERANCE, relative_rmse

# K not a power of two, K = 1, K = M, P = 3 and 5, D not a power of two.
SIZES = [Sizes(2, 3, 3, 3, 5, 24), Sizes(1, 2, 2, 5, 8, 7), Sizes(1, 1, 3, 4, 1, 1), Sizes(1, 2, 1, 6, 6, 48)]


def fuse_products(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let Triton's interpreter round x·y ± z once, as a fused multiply-add does, in float32."""
    multiply = InterpreterBuilder.create_fmul

    def product(self: Any, x: Any, y: Any) -> Any:
        rounded = multiply(self, x, y)
        rounded.attr["exact"] = x.data.astype(np.float64) * y.data
        return rounded

    def fused(combine: Any) -> Any:
        def of_exact(self: Any, x: Any, y: Any) -> Any:
            exact = x.attr.get("exact")
            return self.binary_op(x, y, combine if exact is None else lambda _, other: combine(exact, other))

        return of_exact

    monkeypatch.setattr(InterpreterBuilder, "create_fmul", product)
    monkeypatch.setattr(InterpreterBuilder, "create_fsub", fused(np.subtract))
    monkeypatch.setattr(InterpreterBuilder, "create_fadd", fused(np.add))


def check(
    device: str, gpu: Gpu, sizes: Sizes, dtype: torch.dtype, state_dtype: torch.dtype, *, cape_heads: int,
    position: int, unroll: int = 1,
) -> None:  # fmt: skip
    inputs = random_inputs(sizes, dtype, state_dtype, position)
    output, memory, mass = expected(inputs, sizes, cape_heads)
    given = {name: x.to(device) for name, x in inputs.items()}
    plan = decode_heads.plan(
        **given, order=sizes.order, sub_dim=sizes.sub_dim, top_k=sizes.top_k, cape_heads=cape_heads,
        temperature=TEMPERATURE, decay_power=POWER, eps=EPS, schedule=DecodeHeads(unroll=unroll),
    )  # fmt: skip
    (found,) = plan.run(gpu)
    assert found.dtype == dtype and found.shape == (sizes.batch, sizes.heads * sizes.width)
    assert relative_rmse(found.cpu(), output) <= 2 * max(TOLERANCE[dtype], TOLERANCE[state_dtype])
    assert relative_rmse(given["memory"].cpu(), memory) <= TOLERANCE[state_dtype]
    assert relative_rmse(given["mass"].cpu(), mass) <= TOLERANCE[state_dtype]


@pytest.mark.parametrize("unroll", [0, 1, 2])
@pytest.mark.parametrize("sizes", SIZES)
def test_equals_the_steps_of_the_paper(device: str, gpu: Gpu, sizes: Sizes, unroll: int) -> None:
    check(device, gpu, sizes, torch.float32, torch.float32, cape_heads=0, position=0, unroll=unroll)


@pytest.mark.parametrize("cape_heads", [1, 3])
@pytest.mark.parametrize("position", [0, 5, 27, 2**40 + 3])
def test_the_first_heads_shift_their_addresses_by_the_position(
    device: str, gpu: Gpu, cape_heads: int, position: int
) -> None:
    # float64 keeps the positions of the definition exact, and 27 slots make positions distinguishable.
    check(device, gpu, SIZES[0], torch.float32, torch.float32, cape_heads=cape_heads, position=position)


@pytest.mark.parametrize(
    ("dtype", "state_dtype"),
    [(torch.float64, torch.float64), (torch.bfloat16, torch.float32), (torch.bfloat16, torch.bfloat16),
     (torch.float16, torch.float32)],
)  # fmt: skip
def test_every_type(device: str, gpu: Gpu, dtype: torch.dtype, state_dtype: torch.dtype) -> None:
    check(device, gpu, SIZES[0], dtype, state_dtype, cape_heads=1, position=4)


@pytest.mark.skipif(not interpreted(), reason="it is the interpreter that is changed")
@pytest.mark.parametrize("unroll", [0, 1, 2])
@pytest.mark.parametrize("power", [0.25, 1.5])
def test_a_fused_multiply_add_makes_no_weight_larger_than_1(
    gpu: Gpu, monkeypatch: pytest.MonkeyPatch, power: float, unroll: int
) -> None:
    """Compilers fuse products and sums. (1 − w)^γ is NaN above w = 1, and weights of sharp addresses are near 1."""
    fuse_products(monkeypatch)
    sizes = Sizes(40, 2, 2, 4, 4, 8)
    inputs = random_inputs(sizes, torch.float32, torch.float32)
    inputs["projected"][:, : 2 * sizes.heads * sizes.order * sizes.sub_dim] *= 1000
    inputs["memory"], inputs["mass"] = torch.ones_like(inputs["memory"]), torch.ones_like(inputs["mass"])
    plan = decode_heads.plan(
        **inputs, order=sizes.order, sub_dim=sizes.sub_dim, top_k=sizes.top_k, cape_heads=0, temperature=TEMPERATURE,
        decay_power=power, eps=EPS, schedule=DecodeHeads(unroll=unroll),
    )  # fmt: skip
    (found,) = plan.run(gpu)
    assert found.isfinite().all()
    assert inputs["memory"].isfinite().all()
    # A token adds its weights, which are at most 1, to a mass that it has decayed.
    assert inputs["mass"].isfinite().all() and inputs["mass"].max() <= 1


def test_it_is_one_launch_that_reads_the_position_from_the_device() -> None:
    """The position is a tensor rather than a number, so that a CUDA graph can hold the launch."""
    sizes = SIZES[0]
    inputs = {name: x.to("meta") for name, x in random_inputs(sizes, torch.float32, torch.float32).items()}
    plan = decode_heads.plan(
        **inputs, order=3, sub_dim=3, top_k=5, cape_heads=3, temperature=1.0, decay_power=1.0, eps=1e-6,
        schedule=DecodeHeads(),
    )  # fmt: skip
    (launch,) = plan.launches
    assert launch.grid == (sizes.batch * sizes.heads,)
    assert launch.arguments["position"] is inputs["position"]


@pytest.mark.parametrize("arch", ARCHITECTURES)
def test_compiled_kernels_have_no_spills_and_the_needed_barriers(arch: str) -> None:
    inputs = random_inputs(Sizes(1, 2, 5, 4, 8, 64), torch.bfloat16, torch.float32)
    given = [*inputs.values(), 5, 4, 8, 1, 1.0, 1.0, 1e-6]
    (binary,) = compile_plan("lowering.gpu.decode_heads.triton", given, DecodeHeads(), arch)
    assert binary.resources.spilled == binary.resources.local == 0
    for state in ("memory", "mass"):
        ordering.check_ordered(binary.asm["ttgir"], state)
    ordering.check_barriers_kept(binary.asm)
