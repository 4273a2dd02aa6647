"""The serial scan's kernels against the dense recurrence over all M slots, and as compiled for each architecture."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from lowering.gpu.memory_scan.serial import forward as memory_scan
from lowering.gpu.races import check_barriers_kept, check_ordered, check_thread_owned
from lowering.targets import Gpu
from schedules.gpu import SerialScan
from schedules.kinds import default_schedule
from schedules.workload import Workload
from tests import brute_force
from tests.lowering.gpu.compiled import ARCHITECTURES, compile_plan
from tests.samples import TOLERANCE, relative_rmse, scan_inputs

EPS = 1e-6


def scan(
    inputs: dict[str, Tensor], power: float, device: str, gpu: Gpu, schedule: SerialScan | None = None
) -> tuple[Tensor, ...]:
    """Return output, memory and mass for inputs [B, H, …], on the CPU."""
    arguments = [x.flatten(0, 1).contiguous().to(device) for x in inputs.values()]
    results = memory_scan.plan(*arguments, power, EPS, schedule or SerialScan()).run(gpu)
    like = (inputs["values"], inputs["memory"], inputs["mass"])
    return tuple(x.cpu().view(same.shape) for x, same in zip(results, like, strict=True))


def check(inputs: dict[str, Tensor], power: float, device: str, gpu: Gpu, schedule: SerialScan | None = None) -> None:
    before = {name: x.clone() for name, x in inputs.items()}
    results = scan(inputs, power, device, gpu, schedule)
    expected = brute_force.memory_scan(inputs, decay_power=power, eps=EPS)
    like = (inputs["values"], inputs["memory"], inputs["mass"])
    for name, actual, right, same in zip(("output", "memory", "mass"), results, expected, like, strict=True):
        assert actual.dtype == same.dtype, name
        error = relative_rmse(actual, right)
        assert error <= TOLERANCE[actual.dtype], f"{name}: relative RMSE {error:.1e}"
    for name, x in inputs.items():
        assert torch.equal(x, before[name]), f"{name} was changed"


# (B, H, T, K, M, D), γ, tile
SIZES = [
    ((1, 2, 7, 3, 9, 24), 0.5, 64),
    ((1, 1, 63, 1, 9, 24), 0.0, 64),
    ((1, 1, 63, 3, 9, 5), 1.0, 64),
    ((2, 1, 7, 8, 16, 48), 2.3, 64),
    ((1, 1, 7, 3, 9, 48), 1.0, 32),
    ((1, 1, 1, 8, 8, 64), 2.0, 64),
    ((1, 1, 2, 16, 16, 3), 3.0, 64),
]


@pytest.mark.parametrize(("sizes", "power", "tile"), SIZES)
def test_equals_the_dense_recurrence(device: str, gpu: Gpu, sizes: tuple[int, ...], power: float, tile: int) -> None:
    inputs = scan_inputs(*sizes)
    check(inputs, power, device, gpu, SerialScan(tile=tile, threads=min(tile, 64)))


@pytest.mark.parametrize("state", [None, torch.float32], ids=["same_state", "float32_state"])
@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16, torch.float16])
def test_every_type(device: str, gpu: Gpu, dtype: torch.dtype, state: torch.dtype | None) -> None:
    check(scan_inputs(1, 1, 7, 3, 9, 24, dtype=dtype, state_dtype=state), 2.3, device, gpu)


# A warning of the interpreter; the result of 0^γ is right.
@pytest.mark.filterwarnings("ignore:divide by zero encountered in log2")
@pytest.mark.parametrize("power", [0.0, 0.5, 1.0, 2.3])
def test_write_weights_of_exactly_one_and_zero(device: str, gpu: Gpu, power: float) -> None:
    check(scan_inputs(1, 1, 7, 4, 9, 5, access="saturated"), power, device, gpu)


def test_a_slot_that_most_tokens_access(device: str, gpu: Gpu) -> None:
    check(scan_inputs(1, 1, 63, 2, 9, 5, access="hot"), 1.0, device, gpu)


def test_a_sequence_in_two_calls_gives_the_same_bits(device: str, gpu: Gpu) -> None:
    inputs = scan_inputs(1, 2, 7, 3, 9, 24)
    whole = scan(inputs, 0.5, device, gpu)
    state = {name: inputs[name] for name in ("memory", "mass")}
    outputs = []
    for part in (slice(0, 3), slice(3, 7)):
        tokens = {name: x[:, :, part] for name, x in inputs.items() if name not in state}
        output, state["memory"], state["mass"] = scan({**tokens, **state}, 0.5, device, gpu)
        outputs.append(output)
    for actual, expected in zip((torch.cat(outputs, 2), *state.values()), whole, strict=True):
        assert torch.equal(actual, expected)


def test_two_runs_give_the_same_bits(device: str, gpu: Gpu) -> None:
    inputs = scan_inputs(1, 2, 7, 3, 9, 24, access="hot")
    for first, second in zip(scan(inputs, 2.3, device, gpu), scan(inputs, 2.3, device, gpu), strict=True):
        assert torch.equal(first, second)


@pytest.mark.parametrize("tokens", [7, 8])
@pytest.mark.parametrize(("spans", "power"), [(2, 0.5), (3, 0.0), (5, 1.0), (16, 2.3)])
@pytest.mark.filterwarnings("ignore:divide by zero encountered in log2")
def test_the_mass_in_spans(device: str, gpu: Gpu, tokens: int, spans: int, power: float) -> None:
    inputs = scan_inputs(1, 2, tokens, 3, 9, 5, access="saturated", state_dtype=torch.float32, dtype=torch.bfloat16)
    check(inputs, power, device, gpu, SerialScan(spans=spans))


@pytest.mark.parametrize("arch", ARCHITECTURES)
def test_compiled_kernels_have_no_spills_and_no_races(arch: str) -> None:
    inputs = scan_inputs(1, 1, 7, 8, 1024, 64, dtype=torch.bfloat16, state_dtype=torch.float32)
    arguments = [*(x.flatten(0, 1) for x in inputs.values()), 1.0, EPS]
    binaries = {
        x.name: x for x in compile_plan("lowering.gpu.memory_scan.serial.forward", arguments, SerialScan(spans=4), arch)
    }
    assert set(binaries) == {"copy_elements", "open_spans", "sum_mass", "join_spans", "walk_mass", "scan_rows"}
    for name, binary in binaries.items():
        assert (binary.resources.spilled, binary.resources.shared) == (0, 0), name
        check_barriers_kept(binary.asm)
    check_ordered(binaries["walk_mass"].asm["ttgir"], "mass")
    for buffer in ("gains", "sums"):
        check_ordered(binaries["sum_mass"].asm["ttgir"], buffer)
    check_thread_owned(binaries["scan_rows"].asm["ttgir"], "state")


def test_work_is_counted_from_the_sizes() -> None:
    inputs = [x.flatten(0, 1).to("meta") for x in scan_inputs(2, 3, 7, 4, 9, 48).values()]
    rows = memory_scan.plan(*inputs, 1.0, EPS, SerialScan(tile=32, threads=32)).launches[-1]
    tokens, tiles = 2 * 3 * 7, 2
    row_bytes = 3 * 4 * 48 * 4  # a write loads and stores its row, a read loads it: K rows of D float32 each
    operands = 4 * 4 * 4  # K slots and weights of writes, slots and factors of reads
    assert (rows.work.programs, rows.work.threads, rows.work.steps) == (2 * 3 * tiles, 32, 7)
    assert rows.work.cache_bytes == tokens * (row_bytes + tiles * operands + 2 * 48 * 4)


@pytest.mark.parametrize(
    ("knobs", "message"),
    [
        ({"tile": 48}, "tile is 48; it must be a power of two"),
        ({"tile": 32}, "tile is 32; it must be at least threads = 64, so that no two threads share a channel"),
        ({"tile": 64, "threads": 32}, "tile is 64; it must be at most threads = 32 or less than 2 · D = 48"),
        ({"tile": 128}, "tile is 128; it must be at most threads = 64 or less than 2 · D = 48"),
        ({"threads": 16}, "threads is 16; it must be a power of two in 32..1024"),
        ({"spans": 0}, "spans is 0; it must be 1 or more"),
    ],
)
def test_a_schedule_that_cannot_be_built_is_refused(knobs: dict[str, int], message: str) -> None:
    workload = Workload(op="memory_scan", shape={"N": 1, "T": 7, "K": 8, "M": 16, "D": 24})
    assert SerialScan(**knobs).refusal(workload) == message  # type: ignore[arg-type]


def test_threads_with_several_channels_need_aligned_rows() -> None:
    workload = Workload(op="memory_scan", shape={"N": 1, "T": 7, "K": 8, "M": 16, "D": 33})
    message = "tile is 64; it must be at most threads = 32, as D = 33 is not a multiple of 4"
    assert SerialScan(tile=64, threads=32).refusal(workload) == message
    assert SerialScan(tile=64, threads=64).refusal(workload) is None


def test_a_thread_has_at_most_the_channels_of_one_load() -> None:
    workload = Workload(op="memory_scan", shape={"N": 1, "T": 7, "K": 8, "M": 16, "D": 256})
    message = "tile is 256; it must be at most 4 · threads = 128"
    assert SerialScan(tile=256, threads=32).refusal(workload) == message
    assert SerialScan(tile=256, threads=64).refusal(workload) is None


@pytest.mark.parametrize("top_k", [1, 8, 16, 17, 64])
@pytest.mark.parametrize("value_dim", [1, 24, 64, 300])
def test_the_default_is_valid_and_serial_where_registers_hold_a_token(top_k: int, value_dim: int) -> None:
    workload = Workload(op="memory_scan", shape={"N": 1, "T": 7, "K": top_k, "M": 64, "D": value_dim})
    default = default_schedule(workload, "a100")
    assert default.refusal(workload) is None
    assert default.form == ("serial" if top_k <= 16 else "slots")
