"""memory_step in Triton against the dense recurrence: in place, only on the addressed rows, without races."""

from __future__ import annotations

import re

import pytest
import torch
from torch import Tensor

from lowering.gpu import races as ordering
from lowering.gpu.memory_step import triton as memory_step
from lowering.targets import Gpu
from schedules.gpu.step import MemoryStep
from tests import brute_force
from tests.lowering.gpu.compiled import ARCHITECTURES, compile_plan
from tests.samples import TOLERANCE, relative_rmse, scan_inputs

# (N, K, M, D, γ): K not a power of two, K = M, D not a power of two, D wider than a tile, γ that needs exp2 and log2.
SIZES = [(1, 1, 1, 1, 1.0), (3, 2, 9, 5, 0.5), (3, 9, 9, 24, 2.0), (2, 6, 27, 48, 0.0), (2, 5, 64, 600, 1.7)]
STATE = ("memory", "mass")

# In the interpreter, NumPy warns of log2(0) in 0^γ, and of 0·∞, whose result is not selected.
pytestmark = pytest.mark.filterwarnings("ignore::RuntimeWarning:triton.runtime.interpreter")


def step(inputs: dict[str, Tensor], token: int, state: dict[str, Tensor], gpu: Gpu, power: float = 1.0) -> Tensor:
    """Return the token's output [N, D], updating ``state`` in place."""
    given = {name: x[0, :, token].contiguous() for name, x in inputs.items() if name not in STATE}
    (output,) = memory_step.plan(**given, **state, decay_power=power, eps=1e-6, schedule=MemoryStep()).run(gpu)
    return output


def state_of(inputs: dict[str, Tensor]) -> dict[str, Tensor]:
    return {name: inputs[name][0].clone() for name in STATE}


def inputs_on(device: str, *sizes: int, **options: object) -> dict[str, Tensor]:
    return {name: x.to(device) for name, x in scan_inputs(1, *sizes, **options).items()}


def expected_of(inputs: dict[str, Tensor], power: float = 1.0) -> tuple[Tensor, Tensor, Tensor]:
    on_cpu = {name: x.cpu() for name, x in inputs.items()}
    output, memory, mass = brute_force.memory_scan(on_cpu, decay_power=power)
    return output[0], memory[0], mass[0]


@pytest.mark.parametrize(("heads", "top_k", "num_slots", "width", "power"), SIZES)
def test_steps_equal_the_dense_recurrence(
    device: str, gpu: Gpu, heads: int, top_k: int, num_slots: int, width: int, power: float
) -> None:
    inputs = inputs_on(device, heads, 7, top_k, num_slots, width, access="saturated")
    state = state_of(inputs)
    expected, memory, mass = expected_of(inputs, power)
    for t in range(7):
        assert relative_rmse(step(inputs, t, state, gpu, power).cpu(), expected[:, t]) <= 1e-5
    assert relative_rmse(state["memory"].cpu(), memory) <= 1e-5
    assert relative_rmse(state["mass"].cpu(), mass) <= 1e-5


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("wide_state", [False, True], ids=["same", "float32-state"])
def test_every_type(device: str, gpu: Gpu, dtype: torch.dtype, wide_state: bool) -> None:
    state_dtype = torch.promote_types(dtype, torch.float32) if wide_state else dtype
    inputs = inputs_on(device, 3, 1, 4, 9, 24, dtype=dtype, state_dtype=state_dtype)
    state = state_of(inputs)
    expected, memory, mass = expected_of(inputs)
    output = step(inputs, 0, state, gpu)
    assert output.dtype == dtype and state["memory"].dtype == state_dtype
    # A read uses the row as stored, rounded to the state's dtype.
    assert relative_rmse(output.cpu(), expected[:, 0]) <= 2 * TOLERANCE[dtype]
    assert relative_rmse(state["memory"].cpu(), memory) <= TOLERANCE[state_dtype]
    assert relative_rmse(state["mass"].cpu(), mass) <= TOLERANCE[state_dtype]


def test_only_the_addressed_rows_are_accessed(device: str, gpu: Gpu) -> None:
    """All other rows hold NaN, which would appear in the output if one were read, and must still be there."""
    inputs = inputs_on(device, 3, 1, 4, 27, 5)
    written, read = (
        brute_force.k_hot(inputs[f"{way}_slots"][0, :, 0].cpu(), torch.ones(3, 4), 27).bool().to(device)
        for way in ("write", "read")
    )
    assert bool((written & read).any()), "some slot is both written and read"
    clean, poisoned = state_of(inputs), state_of(inputs)
    for x in poisoned.values():
        x[~(written | read)] = torch.nan
    assert torch.equal(step(inputs, 0, poisoned, gpu), step(inputs, 0, clean, gpu))
    for name, x in poisoned.items():
        assert torch.equal(x[written], clean[name][written])
        assert torch.equal(x[read & ~written], inputs[name][0][read & ~written])
        assert bool(x[~(written | read)].isnan().all())


def test_an_infinity_that_is_not_read_does_not_affect_the_output(device: str, gpu: Gpu) -> None:
    inputs = inputs_on(device, 1, 1, 1, 3, 5)
    inputs["write_slots"][:], inputs["read_slots"][:] = 2, 1
    inputs["memory"][0, 0, 2] = torch.inf
    state = state_of(inputs)
    assert bool(step(inputs, 0, state, gpu).isfinite().all())
    assert bool(state["memory"][0, 2].isinf().all())


def arguments(heads: int, top_k: int, num_slots: int, width: int) -> list[object]:
    """Return the arguments of ``plan`` in bfloat16 with a float32 state."""
    inputs = scan_inputs(1, heads, 1, top_k, num_slots, width, dtype=torch.bfloat16, state_dtype=torch.float32)
    tensors = [x[0] if name in STATE else x[0, :, 0] for name, x in inputs.items()]
    return [*tensors, 1.0, 1e-6]


@pytest.mark.parametrize("arch", ["sm_86", "sm_87", "sm_89"])
def test_the_ptx_is_that_of_the_first_architecture_of_its_generation(arch: str) -> None:
    def ptx(arch: str) -> str:
        (binary,) = compile_plan("lowering.gpu.memory_step.triton", arguments(2, 8, 1024, 64), MemoryStep(), arch)
        return re.sub(r"\.target sm_\d+", ".target", binary.asm["ptx"])

    assert ptx(arch) == ptx("sm_80")


@pytest.mark.parametrize("arch", ARCHITECTURES)
def test_compiled_kernels_have_no_spills_and_the_needed_barriers(arch: str) -> None:
    for given in (arguments(2, 8, 1024, 64), arguments(1, 5, 9, 600)):
        for binary in compile_plan("lowering.gpu.memory_step.triton", given, MemoryStep(), arch):
            if given[4].shape[-1] == 64:
                assert binary.resources.spilled == binary.resources.local == 0
            for state in STATE:
                ordering.check_ordered(binary.asm["ttgir"], state)
            ordering.check_barriers_kept(binary.asm)
