"""The backward of the scan over slots in Triton against autograd's gradients of the dense recurrence."""

from __future__ import annotations

from math import prod

import pytest
import torch
from torch import Tensor

from lowering.gpu import races as ordering
from lowering.gpu.memory_scan.slots import backward as memory_scan_slots_backward
from lowering.gpu.plan import Plan
from lowering.targets import Gpu
from schedules.gpu import SlotsScan
from tests import brute_force
from tests.lowering.gpu.compiled import ARCHITECTURES, compile_plan
from tests.lowering.gpu.test_scan_slots import CASES, meta_arguments
from tests.samples import DIFFERENTIABLE, TOLERANCE, cotangents, relative_rmse, scan_inputs

PROXY_EPS = 0.01


def schedule(device: str, piece: int = 16, heads: int = 0) -> SlotsScan:
    return SlotsScan(threads=64 if device == "cuda" else 1024, piece=piece, heads=heads)


def expected_of(inputs: dict[str, Tensor], power: float) -> tuple[Tensor, ...]:
    return brute_force.memory_scan_gradients(cotangents(inputs), inputs, power, proxy_eps=PROXY_EPS)


def plan_of(device: str, inputs: dict[str, Tensor], power: float, knobs: SlotsScan) -> Plan:
    given = [x.flatten(0, 1).to(device) for x in (*cotangents(inputs), *inputs.values())]
    return memory_scan_slots_backward.plan(*given, power, 1e-6, PROXY_EPS, knobs)


@pytest.mark.parametrize(("tokens", "top_k", "num_slots", "width", "access", "piece", "power"), CASES)
def test_every_gradient_equals_autograds(
    device: str, gpu: Gpu, tokens: int, top_k: int, num_slots: int, width: int, access: str, piece: int, power: float
) -> None:
    inputs = scan_inputs(1, 2, tokens, top_k, num_slots, width, access=access, seed=tokens)
    found = plan_of(device, inputs, power, schedule(device, piece)).run(gpu)
    for name, one, other in zip(DIFFERENTIABLE, found, expected_of(inputs, power), strict=True):
        assert relative_rmse(one.cpu(), other[0]) <= 1e-5, name


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
@pytest.mark.parametrize("wide_state", [False, True], ids=["same", "float32-state"])
def test_every_type(device: str, gpu: Gpu, dtype: torch.dtype, wide_state: bool) -> None:
    state_dtype = torch.promote_types(dtype, torch.float32) if wide_state else dtype
    inputs = scan_inputs(1, 2, 7, 3, 9, 24, dtype=dtype, state_dtype=state_dtype)
    found = plan_of(device, inputs, 1.0, schedule(device)).run(gpu)
    for name, one, other in zip(DIFFERENTIABLE, found, expected_of(inputs, 1.0), strict=True):
        assert one.dtype == inputs[name].dtype
        assert relative_rmse(one.cpu(), other[0]) <= TOLERANCE[one.dtype], name


def test_heads_in_groups_and_a_second_run_give_the_same_bits(device: str, gpu: Gpu) -> None:
    inputs = scan_inputs(1, 3, 7, 2, 9, 24)
    plan = plan_of(device, inputs, 2.3, schedule(device, piece=8))
    first = [x.clone() for x in plan.run(gpu)]
    for again in (plan, plan_of(device, inputs, 2.3, schedule(device, piece=8, heads=2))):
        for one, other in zip(first, again.run(gpu), strict=True):
            assert torch.equal(one, other)


def arguments(heads: int) -> list[object]:
    inputs = meta_arguments(heads)
    return [*inputs[4:7], *inputs[:9], PROXY_EPS]


def test_fewer_heads_at_a_time_take_less_memory() -> None:
    def held(heads: int) -> int:
        plan = memory_scan_slots_backward.plan(*arguments(8), SlotsScan(heads=heads))
        tensors = [x for launch in plan.launches for x in launch.arguments.values() if isinstance(x, Tensor)]
        scratch = {id(x.untyped_storage()): x.untyped_storage().nbytes() for x in tensors if x.dim() <= 2}
        return sum(scratch.values())

    assert held(2) <= held(0) / 3


def test_work_counts_what_the_launches_do() -> None:
    plan = memory_scan_slots_backward.plan(*arguments(4), SlotsScan())
    for launch in plan.launches:
        work = launch.work
        assert (work.programs, work.threads) == (prod(launch.grid), launch.threads)
        assert 0 < work.dram_bytes <= work.cache_bytes
    # Each write loads its value 3 times, and each read loads ∂o twice; a row for each write is stored and loaded once.
    rows = 4 * 4096 * 8 * 64
    assert sum(launch.work.cache_bytes for launch in plan.launches) >= rows * (3 * 2 + 2 * 2 + 4 + 4)


@pytest.mark.parametrize("arch", ARCHITECTURES)
def test_compiled_kernels_have_no_spills_and_threads_do_not_communicate(arch: str) -> None:
    given, knobs = arguments(4), SlotsScan()
    launches = memory_scan_slots_backward.plan(*given, knobs).launches
    binaries = compile_plan("lowering.gpu.memory_scan.slots.backward", given, knobs, arch)
    for launch, binary in zip(launches, binaries, strict=True):
        assert binary.resources.spilled == 0, binary.name
        tensors = [name for name, x in launch.arguments.items() if isinstance(x, Tensor)]
        shared = [name for name in tensors if len(ordering.kinds(binary.asm["ttgir"], name)) > 1]
        assert shared == {"mass_scan": ["weights"], "mass_reads": ["mass_terms"]}.get(binary.name, [])
        for name in shared:
            ordering.check_thread_owned(binary.asm["ttgir"], name)
