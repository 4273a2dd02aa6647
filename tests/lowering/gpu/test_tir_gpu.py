"""TIR's kernels for GPUs: their templates run on the CPU as loops over programs and threads.

The loops over threads must give the same bits in either order, as threads are independent within a phase.
``test_tir_cuda`` checks the barriers between phases.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from ramnet.ops import reference
from schedules import records
from schedules.base import Schedule
from schedules.gpu.address import AddressDecode, AddressDecodeBackward
from schedules.gpu.shared import SharedScan, SharedScanBackward
from schedules.gpu.step import DecodeHeads, MemoryStep
from schedules.workload import Op, Workload
from tests import brute_force
from tests.decode_heads import EPS, POWER, TEMPERATURE, Sizes, expected, random_inputs
from tests.samples import (
    DIFFERENTIABLE,
    TOLERANCE,
    as_backends_take,
    cotangents,
    relative_rmse,
    scan_inputs,
    step_inputs,
)

pytest.importorskip("tvm", reason="TIR's kernels need tvm: pip install 'ramnet[tvm]'")

from lowering.gpu import tir
from lowering.gpu.backend import GpuKernels
from lowering.gpu.decode_heads.options import MixerOptions
from lowering.gpu.kernels import plan


def kernels(**given: Schedule) -> GpuKernels:
    return GpuKernels("h100", given=given)


@pytest.fixture(autouse=True)
def poisoned() -> Any:
    """Fill every torch.empty with NaN."""
    torch.use_deterministic_algorithms(True)
    yield
    torch.use_deterministic_algorithms(False)


SHAPES = [
    # (T, K, M, D), γ, access, type, then slot_lanes, channels, chunk, heads: tiles are 32 / slot_lanes · channels wide
    ((7, 5, 24, 24), 0.5, "hot", torch.float32, 1, 1, 2, 0),
    ((63, 6, 50, 48), 2.3, "saturated", torch.float32, 2, 2, 4, 1),
    ((63, 6, 50, 48), 1.0, "saturated", torch.bfloat16, 2, 4, 2, 0),
    ((63, 8, 50, 48), 1.0, "hot", torch.bfloat16, 8, 4, 16, 1),
    ((35, 8, 50, 24), 0.5, "uniform", torch.float16, 8, 4, 4, 0),
    ((1, 3, 9, 5), 0.0, "uniform", torch.float32, 1, 1, 2, 0),
    ((7, 4, 16, 24), 1.0, "hot", torch.float64, 4, 2, 3, 0),
]


@pytest.mark.parametrize(("sizes", "gamma", "access", "dtype", "lanes", "channels", "chunk", "heads"), SHAPES)
def test_scans_equal_the_definition(sizes, gamma, access, dtype, lanes, channels, chunk, heads) -> None:
    state = torch.float64 if dtype == torch.float64 else torch.float32
    tensors = scan_inputs(1, 2, *sizes, dtype=dtype, state_dtype=state, access=access, seed=1)
    knobs = {"slot_lanes": lanes, "channels": channels, "chunk": chunk}
    ops = kernels(memory_scan=SharedScan(**knobs), memory_scan_backward=SharedScanBackward(**knobs, heads=heads))
    expected = brute_force.memory_scan(tensors, decay_power=gamma, eps=1e-6)
    for got, want in zip(
        ops.memory_scan(*as_backends_take(tensors.values()), gamma, 1e-6, 0.01), expected, strict=True
    ):
        assert relative_rmse(got, want) < TOLERANCE[got.dtype]

    grads = cotangents(tensors)
    gradients = brute_force.memory_scan_gradients(grads, tensors, gamma, 1e-6, 0.01)
    found = ops.memory_scan_backward(grads, *as_backends_take(tensors.values()), gamma, 1e-6, 0.01)
    for name, got, want in zip(DIFFERENTIABLE, found, gradients, strict=True):
        assert relative_rmse(got, want) < TOLERANCE[got.dtype], name


@pytest.mark.parametrize("wide", ["write_weights", "values", "memory"])
def test_one_float64_input_makes_a_scan_float64(wide: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """A record of float32 does not apply if its programs do not fit float64's sums."""
    scans = [each for each in records.load(records.shipped_path("h200")) if each.workload.op.startswith("memory_scan")]
    here = [
        each.model_copy(update={"workload": Workload.of(each.workload.op, (2, 9, 8, 64, 64), torch.float32,
                                                        each.workload.constants)})
        for each in scans
    ]  # fmt: skip
    assert {each.knobs["form"] for each in here} == {"shared"}
    monkeypatch.setattr(records, "known", lambda target: here)
    tensors = scan_inputs(1, 2, 9, 8, 64, 64, state_dtype=torch.float32, seed=2)
    same = {"write_weights": ("read_weights",), "memory": ("mass",)}.get(wide, ())
    tensors |= {name: tensors[name].double() for name in (wide, *same)}
    ops = GpuKernels("h200")
    expected = brute_force.memory_scan(tensors, decay_power=1.0, eps=1e-6)
    found = ops.memory_scan(*as_backends_take(tensors.values()), 1.0, 1e-6, 0.01)
    for got, want in zip(found, expected, strict=True):
        assert relative_rmse(got, want) < 1e-7
    grads = cotangents(tensors)
    gradients = brute_force.memory_scan_gradients(grads, tensors, 1.0, 1e-6, 0.01)
    backward = ops.memory_scan_backward(grads, *as_backends_take(tensors.values()), 1.0, 1e-6, 0.01)
    for name, got, want in zip(DIFFERENTIABLE, backward, gradients, strict=True):
        assert got.dtype == tensors[name].dtype
        assert relative_rmse(got, want) < 1e-7, name


@pytest.mark.parametrize(
    ("R", "U", "P", "K", "dtype", "unroll"),
    [(37, 3, 3, 4, torch.float32, 1), (70, 5, 4, 8, torch.bfloat16, 0), (1, 2, 5, 7, torch.float64, 2)],
)
def test_addresses_and_their_gradients(R, U, P, K, dtype, unroll) -> None:
    logits = torch.randn(R, U, P, generator=torch.Generator().manual_seed(3)).to(dtype)
    ops = kernels(
        address_decode=AddressDecode(compiler="tir", threads=32, unroll=unroll),
        address_decode_backward=AddressDecodeBackward(compiler="tir", threads=32),
    )
    slots, weights = ops.address_decode(logits, K)
    expected, grads, gradient = brute_force.largest_weights(logits, K)
    assert relative_rmse(weights, expected) < TOLERANCE[dtype]
    exact = brute_force.product_softmax(logits).gather(-1, slots.long())
    assert relative_rmse(exact, expected) < TOLERANCE[dtype]
    got = ops.address_decode_backward(grads, logits, slots, exact.to(dtype))
    assert relative_rmse(got, gradient) < 2 * TOLERANCE[dtype]


@pytest.mark.parametrize(("D", "gamma", "dtype"), [(24, 0.5, torch.float32), (37, 2.3, torch.bfloat16)])
def test_a_step_in_place(D, gamma, dtype) -> None:
    tensors = scan_inputs(2, 3, 1, 5, 24, D, dtype=dtype, state_dtype=torch.float32, access="saturated", seed=5)
    got, wanted = (step_inputs(tensors, 0) for _ in range(2))
    wanted = {n: x.double() if x.is_floating_point() else x for n, x in wanted.items()}
    ops = kernels(memory_step=MemoryStep(compiler="tir", threads=32))
    output = ops.memory_step(*as_backends_take(got.values()), gamma, 1e-6)
    expected = reference.memory_step(*as_backends_take(wanted.values()), gamma, 1e-6)
    assert relative_rmse(output, expected) < TOLERANCE[dtype]
    for name in ("memory", "mass"):
        assert relative_rmse(got[name], wanted[name]) < TOLERANCE[torch.float32]


@pytest.mark.parametrize(("cape_heads", "position", "unroll"), [(0, 0, 0), (1, 5, 1), (3, 2**40 + 3, 1)])
def test_a_layers_token_in_one_launch(cape_heads: int, position: int, unroll: int) -> None:
    sizes = Sizes(batch=2, heads=3, order=3, sub_dim=3, top_k=5, width=24)
    inputs = random_inputs(sizes, torch.float32, torch.float32, position)
    states = expected(inputs, sizes, cape_heads)
    ops = kernels(decode_heads=DecodeHeads(compiler="tir", threads=32, unroll=unroll))
    output = ops.decode_heads(*inputs.values(), MixerOptions(3, 3, 5, cape_heads, TEMPERATURE, POWER, EPS))
    for got, want in zip((output, inputs["memory"], inputs["mass"]), states, strict=True):
        assert relative_rmse(got, want.view(got.shape)) < TOLERANCE[torch.float32]


def test_a_scan_takes_tensors_that_begin_anywhere() -> None:
    """Wide loads fault on a GPU unless their addresses are multiples of 16 bytes."""
    tensors = [x.flatten(0, 1) for x in scan_inputs(1, 2, 5, 4, 16, 8, seed=9).values()]
    shifted = [torch.cat([x.flatten()[:1], x.flatten()])[1:].view(x.shape) for x in tensors]
    assert any(x.data_ptr() % 16 for x in shifted)
    for op, schedule, given in (
        ("memory_scan", SharedScan(channels=4, slot_lanes=4, chunk=8), [*shifted, 1.0, 1e-6]),
        ("memory_scan_backward", SharedScanBackward(channels=4, slot_lanes=4, chunk=8),
         [*shifted[4:], *shifted, 1.0, 1e-6, 0.01]),
    ):  # fmt: skip
        launches: Any = plan(op, schedule, *given).launches
        assert all(x.data_ptr() % 16 == 0 for launch in launches for x in launch.tensors)


def both_ways(op: Op, schedule: Schedule, tensors: list[Tensor], outputs: list[Tensor]) -> list[list[Tensor]]:
    """Run an op's only kernel with its loops over threads forwards and in reverse."""
    launch: Any = plan(op, schedule, *tensors, 1.0, 1e-6).launches[0]
    results = []
    for reverse in (False, True):
        mine = [x.clone() for x in (*tensors, *outputs)]
        launch.kernels.on_cpu(reverse_threads=reverse)(op, *mine)
        results.append(mine)
    return results


def test_threads_of_a_phase_are_independent() -> None:
    tensors = [x.flatten(0, 1) for x in scan_inputs(1, 2, 19, 6, 20, 24, access="hot", seed=6).values()]
    schedule = SharedScan(slot_lanes=2, channels=1, chunk=2)
    forwards, reverse = both_ways("memory_scan", schedule, tensors, [torch.zeros_like(x) for x in tensors[4:]])
    assert all(torch.equal(x, y) for x, y in zip(forwards, reverse, strict=True))
    step = [x.flatten(0, 1) for x in step_inputs(scan_inputs(1, 2, 1, 6, 20, 24, seed=7), 0).values()]
    forwards, reverse = both_ways(
        "memory_step", MemoryStep(compiler="tir", threads=32), step, [torch.zeros_like(step[4])]
    )
    assert all(torch.equal(x, y) for x, y in zip(forwards, reverse, strict=True))


def test_threads_of_a_backward_phase_are_independent(monkeypatch: pytest.MonkeyPatch) -> None:
    tensors = scan_inputs(1, 1, 19, 6, 20, 24, access="hot", seed=8)
    grads = [torch.ones_like(tensors[name]) for name in ("values", "memory", "mass")]
    ops = kernels(memory_scan_backward=SharedScanBackward(slot_lanes=2, channels=1, chunk=2))
    found = []
    on_cpu = tir.Kernels.on_cpu
    for reverse in (False, True):
        monkeypatch.setattr(tir, "_loops", {})
        monkeypatch.setattr(tir.Kernels, "on_cpu", lambda kernels, way=reverse: on_cpu(kernels, way))
        found.append(ops.memory_scan_backward(grads, *as_backends_take(tensors.values()), 0.5, 1e-6, 0.01))
    assert all(torch.equal(x, y) for x, y in zip(*found, strict=True))
