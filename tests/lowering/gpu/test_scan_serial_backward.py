"""The serial scan's gradients against those of the dense recurrence, and as compiled for each architecture."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from lowering.gpu.memory_scan.serial import backward as memory_scan_backward
from lowering.gpu.races import check_barriers_kept, check_ordered, check_thread_owned
from lowering.targets import Gpu
from schedules.gpu import SerialScanBackward
from schedules.workload import Workload
from tests import brute_force
from tests.lowering.gpu.compiled import ARCHITECTURES, compile_plan
from tests.samples import DIFFERENTIABLE, TOLERANCE, cotangents, relative_rmse, scan_inputs

EPS, PROXY_EPS = 1e-6, 0.01


def gradients(
    inputs: dict[str, Tensor], power: float, device: str, gpu: Gpu, schedule: SerialScanBackward
) -> tuple[Tensor, ...]:
    """Return the gradients of ``DIFFERENTIABLE``, on the CPU."""
    arguments = [x.flatten(0, 1).contiguous().to(device) for x in (*cotangents(inputs), *inputs.values())]
    results = memory_scan_backward.plan(*arguments, power, EPS, PROXY_EPS, schedule).run(gpu)
    return tuple(x.cpu().view(inputs[name].shape) for x, name in zip(results, DIFFERENTIABLE, strict=True))


def check(
    inputs: dict[str, Tensor], power: float, device: str, gpu: Gpu, schedule: SerialScanBackward | None = None
) -> None:
    before = {name: x.clone() for name, x in inputs.items()}
    results = gradients(inputs, power, device, gpu, schedule or SerialScanBackward())
    expected = brute_force.memory_scan_gradients(cotangents(inputs), inputs, power, EPS, PROXY_EPS)
    for name, actual, right in zip(DIFFERENTIABLE, results, expected, strict=True):
        assert actual.dtype == inputs[name].dtype, name
        error = relative_rmse(actual, right)
        assert error <= 2 * TOLERANCE[actual.dtype], f"gradient of {name}: relative RMSE {error:.1e}"
    for name, x in inputs.items():
        assert torch.equal(x, before[name]), f"{name} was changed"


# (B, H, T, K, M, D), γ, tile, checkpoint
SIZES = [
    ((1, 2, 7, 3, 9, 24), 0.5, 64, 256),
    ((1, 1, 63, 1, 9, 24), 0.0, 64, 20),
    ((1, 1, 7, 8, 19, 48), 2.3, 64, 3),
    ((1, 1, 7, 3, 9, 48), 1.0, 32, 7),
    ((1, 1, 1, 8, 8, 64), 2.0, 64, 1),
    ((1, 1, 2, 16, 16, 3), 3.0, 64, 1),
]


@pytest.mark.parametrize(("sizes", "power", "tile", "checkpoint"), SIZES)
def test_equals_the_dense_recurrence(
    device: str, gpu: Gpu, sizes: tuple[int, ...], power: float, tile: int, checkpoint: int
) -> None:
    inputs = scan_inputs(*sizes)
    schedule = SerialScanBackward(tile=tile, threads=min(tile, 64), checkpoint=checkpoint)
    check(inputs, power, device, gpu, schedule)


@pytest.mark.parametrize("state", [None, torch.float32], ids=["same_state", "float32_state"])
@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16, torch.float16])
def test_every_type(device: str, gpu: Gpu, dtype: torch.dtype, state: torch.dtype | None) -> None:
    inputs = scan_inputs(1, 1, 5, 3, 9, 24, dtype=dtype, state_dtype=state)
    check(inputs, 0.5, device, gpu, SerialScanBackward(checkpoint=2))


@pytest.mark.filterwarnings(
    "ignore:divide by zero encountered in log2"
)  # a warning of the interpreter; the result of 0^γ is right
@pytest.mark.parametrize("power", [0.0, 0.5, 1.0, 2.3])
def test_write_weights_of_exactly_one_and_zero(device: str, gpu: Gpu, power: float) -> None:
    """A decay of 0 erases the row before it, which the backward still needs."""
    check(scan_inputs(1, 1, 7, 4, 9, 5, access="saturated"), power, device, gpu, SerialScanBackward(checkpoint=4))


def test_a_slot_that_most_tokens_access(device: str, gpu: Gpu) -> None:
    check(scan_inputs(1, 1, 21, 2, 9, 5, access="hot"), 1.0, device, gpu, SerialScanBackward(checkpoint=8))


def test_checkpoints_and_a_second_run_give_the_same_bits(device: str, gpu: Gpu) -> None:
    inputs = scan_inputs(1, 1, 7, 3, 9, 24)
    once = gradients(inputs, 0.5, device, gpu, SerialScanBackward(checkpoint=7))
    for checkpoint in (3, 7):
        again = gradients(inputs, 0.5, device, gpu, SerialScanBackward(checkpoint=checkpoint))
        for name, actual, expected in zip(DIFFERENTIABLE, again, once, strict=True):
            assert torch.equal(actual, expected), name


@pytest.mark.parametrize(("tokens", "spans", "power"), [(7, 2, 0.5), (7, 3, 0.0), (8, 5, 1.0), (7, 16, 2.3)])
@pytest.mark.filterwarnings("ignore:divide by zero encountered in log2")
def test_the_mass_in_spans(device: str, gpu: Gpu, tokens: int, spans: int, power: float) -> None:
    inputs = scan_inputs(1, 2, tokens, 3, 9, 5, access="saturated")
    check(inputs, power, device, gpu, SerialScanBackward(spans=spans))


@pytest.mark.parametrize("arch", ARCHITECTURES)
def test_compiled_kernels_have_no_spills_and_no_races(arch: str) -> None:
    inputs = scan_inputs(1, 1, 7, 8, 1024, 64, dtype=torch.bfloat16, state_dtype=torch.float32)
    arguments = [x.flatten(0, 1) for x in (*cotangents(inputs), *inputs.values())]
    compiled = compile_plan(
        "lowering.gpu.memory_scan.serial.backward", [*arguments, 1.0, EPS, PROXY_EPS], SerialScanBackward(spans=4), arch
    )
    binaries = {x.name: x for x in compiled}
    assert set(binaries) == {
        "copy_elements", "open_spans", "sum_mass", "join_spans", "walk_mass", "scan_rows_backward",
        "sum_mass_backward", "walk_mass_backward",
    }  # fmt: skip
    for name, binary in binaries.items():
        assert binary.resources.spilled == 0, name
        check_barriers_kept(binary.asm)
    check_ordered(binaries["walk_mass"].asm["ttgir"], "mass")
    check_ordered(binaries["walk_mass_backward"].asm["ttgir"], "grad_mass")
    for buffer in ("gains", "sums"):
        check_ordered(binaries["sum_mass_backward"].asm["ttgir"], buffer)
    for owned in ("states", "history", "grad_state"):
        check_thread_owned(binaries["scan_rows_backward"].asm["ttgir"], owned)


def test_the_default_checkpoint_takes_the_least_memory() -> None:
    """T/c copies of M rows and c tokens' K rows: 4096/1024 · 1024 + 1024 · 8 rows are fewer than at half or twice c."""
    shape = {"N": 256, "T": 4096, "K": 8, "M": 1024, "D": 64}
    default = SerialScanBackward.default(Workload(op="memory_scan_backward", shape=shape))
    assert (default.checkpoint, default.spans) == (1024, 16)
    assert default.checkpoint in default.space(Workload(op="memory_scan_backward", shape=shape))["checkpoint"]


def test_a_checkpoint_of_no_tokens_is_refused() -> None:
    workload = Workload(op="memory_scan_backward", shape={"N": 1, "T": 7, "K": 8, "M": 16, "D": 24})
    assert SerialScanBackward(checkpoint=0).refusal(workload) == "checkpoint is 0; it must be 1 or more"
