"""The scan over slots in Triton against the dense recurrence: any sizes, hot slots in many pieces, equal bits."""

from __future__ import annotations

from math import prod

import pytest
import torch
from torch import Tensor

from lowering.gpu import races as ordering
from lowering.gpu.memory_scan.slots import forward as memory_scan_slots
from lowering.gpu.plan import Plan
from lowering.targets import Gpu
from schedules.gpu import SlotsScan
from tests import brute_force
from tests.lowering.gpu.compiled import ARCHITECTURES, compile_plan
from tests.samples import TOLERANCE, relative_rmse, scan_inputs

# (T, K, M, D, access, piece, γ): pieces that hold several slots, slots that span several pieces, more slots than
# accesses, one of everything, write weights of exactly 1.
CASES = [
    (1, 1, 1, 1, "uniform", 8, 1.0),
    (7, 3, 5, 24, "uniform", 8, 0.0),
    (63, 1, 300, 48, "uniform", 32, 2.3),
    (63, 3, 40, 24, "hot", 8, 0.5),
    (63, 8, 9, 48, "saturated", 16, 1.0),
    (7, 8, 16, 48, "saturated", 8, 0.5),
    (7, 2, 3, 24, "saturated", 16, 0.0),
]


def schedule(device: str, piece: int = 16, heads: int = 0) -> SlotsScan:
    """The interpreter's time grows with the number of programs, so use few programs of many threads."""
    return SlotsScan(threads=64 if device == "cuda" else 1024, piece=piece, heads=heads)


def plan_of(device: str, inputs: dict[str, Tensor], power: float, knobs: SlotsScan) -> Plan:
    given = [x.flatten(0, 1).to(device) for x in inputs.values()]
    return memory_scan_slots.plan(*given, power, 1e-6, knobs)


@pytest.mark.parametrize(("tokens", "top_k", "num_slots", "width", "access", "piece", "power"), CASES)
def test_equals_the_dense_recurrence(
    device: str, gpu: Gpu, tokens: int, top_k: int, num_slots: int, width: int, access: str, piece: int, power: float
) -> None:
    inputs = scan_inputs(1, 2, tokens, top_k, num_slots, width, access=access, seed=tokens)
    expected = brute_force.memory_scan(inputs, decay_power=power)
    found = plan_of(device, inputs, power, schedule(device, piece)).run(gpu)
    for one, other in zip(found, expected, strict=True):
        assert relative_rmse(one.cpu(), other[0]) <= 1e-5


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("wide_state", [False, True], ids=["same", "float32-state"])
def test_every_type(device: str, gpu: Gpu, dtype: torch.dtype, wide_state: bool) -> None:
    state_dtype = torch.promote_types(dtype, torch.float32) if wide_state else dtype
    inputs = scan_inputs(1, 2, 7, 3, 9, 24, dtype=dtype, state_dtype=state_dtype)
    expected = brute_force.memory_scan(inputs)
    found = plan_of(device, inputs, 1.0, schedule(device)).run(gpu)
    for one, other, kind in zip(found, expected, (dtype, state_dtype, state_dtype), strict=True):
        assert one.dtype == kind
        assert relative_rmse(one.cpu(), other[0]) <= TOLERANCE[kind]


def test_heads_in_groups_and_a_second_run_give_the_same_bits(device: str, gpu: Gpu) -> None:
    inputs = scan_inputs(1, 3, 7, 2, 9, 24)
    plan = plan_of(device, inputs, 1.0, schedule(device, piece=8))
    first = [x.clone() for x in plan.run(gpu)]
    for again in (plan, plan_of(device, inputs, 1.0, schedule(device, piece=8, heads=2))):
        for one, other in zip(first, again.run(gpu), strict=True):
            assert torch.equal(one, other)


def test_an_infinity_does_not_affect_other_slots(device: str, gpu: Gpu) -> None:
    inputs = scan_inputs(1, 1, 20, 2, 5, 24)
    sound = plan_of(device, inputs, 1.0, schedule(device, 8)).run(gpu)
    inputs["memory"][:, :, 2], inputs["mass"][:, :, 2] = torch.inf, torch.inf
    _, memory, mass = plan_of(device, inputs, 1.0, schedule(device, 8)).run(gpu)
    others = [0, 1, 3, 4]
    assert torch.equal(memory[:, others], sound[1][:, others])
    assert torch.equal(mass[:, others], sound[2][:, others])


def meta_arguments(heads: int = 4) -> list[object]:
    """Return the arguments of ``plan`` at the sizes of the 340m model, in bfloat16 with a float32 state."""

    def empty(*shape: int, dtype: torch.dtype = torch.bfloat16) -> Tensor:
        return torch.empty(heads, *shape, dtype=dtype, device="meta")

    slots, weights, values = empty(4096, 8, dtype=torch.int32), empty(4096, 8), empty(4096, 64)
    memory, mass = empty(1024, 64, dtype=torch.float32), empty(1024, dtype=torch.float32)
    return [slots, weights, slots, weights, values, memory, mass, 1.0, 1e-6]


def test_work_counts_what_the_launches_do() -> None:
    plan = memory_scan_slots.plan(*meta_arguments(), SlotsScan())
    for launch in plan.launches:
        work = launch.work
        assert (work.programs, work.threads) == (prod(launch.grid), launch.threads)
        assert 0 < work.dram_bytes <= work.cache_bytes
    # Each write loads its value twice; a row for each read is stored and loaded once.
    rows = 4 * 4096 * 8 * 64
    assert sum(launch.work.cache_bytes for launch in plan.launches) >= rows * (2 + 2 + 4 + 4)


@pytest.mark.parametrize("arch", ARCHITECTURES)
def test_compiled_kernels_have_no_spills_and_threads_do_not_communicate(arch: str) -> None:
    given, knobs = meta_arguments(), SlotsScan()
    launches = memory_scan_slots.plan(*given, knobs).launches
    binaries = compile_plan("lowering.gpu.memory_scan.slots.forward", given, knobs, arch)
    for launch, binary in zip(launches, binaries, strict=True):
        assert binary.resources.spilled == 0, binary.name
        tensors = [name for name, x in launch.arguments.items() if isinstance(x, Tensor)]
        shared = [name for name in tensors if len(ordering.kinds(binary.asm["ttgir"], name)) > 1]
        assert shared == (["weights"] if binary.name == "mass_scan" else [])
        for name in shared:
            ordering.check_thread_owned(binary.asm["ttgir"], name)
