"""The checks for data races fail on kernels that have one."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from lowering.gpu.memory_scan.serial import mass as memory_scan_mass
from lowering.gpu.memory_scan.serial import mass_backward as memory_scan_mass_backward
from lowering.gpu.races import RaceError, check_barriers_kept, check_ordered, check_thread_owned
from lowering.gpu.triton_compiler import Binary
from schedules.gpu import SerialScan, SerialScanBackward
from tests.lowering.gpu import racing
from tests.lowering.gpu.compiled import ARCHITECTURES, compile_plan
from tests.samples import scan_inputs

RACING = "tests.lowering.gpu.racing"


def compile_one(plan: str, arguments: list[Any], arch: str) -> Binary:
    (binary,) = compile_plan(RACING, arguments, None, arch, plan)
    return binary


@pytest.mark.parametrize("arch", ["sm_80", "gfx942"])
def test_a_barrier_between_neighbours_is_enough(arch: str) -> None:
    binary = compile_one("plan_rotate", ["loop"], arch)
    check_ordered(binary.asm["ttgir"], "buffer")
    check_barriers_kept(binary.asm)


@pytest.mark.parametrize("arch", ["sm_80", "gfx942"])
@pytest.mark.parametrize("barrier", ["none", "branch"])
def test_a_missing_barrier_and_one_in_a_branch_are_reported(arch: str, barrier: str) -> None:
    binary = compile_one("plan_rotate", [barrier], arch)
    with pytest.raises(RaceError, match="no barrier between two accesses of buffer, a load and a store"):
        check_ordered(binary.asm["ttgir"], "buffer")


@pytest.mark.parametrize("arch", ARCHITECTURES)
@pytest.mark.parametrize(
    ("plan", "module", "arguments", "buffers"),
    [
        ("plan_mass_without", memory_scan_mass, racing.mass_arguments(),
         {"walk_mass": ["mass"], "sum_mass": ["gains", "sums"]}),
        ("plan_mass_backward_without", memory_scan_mass_backward, racing.mass_backward_arguments(),
         {"walk_mass_backward": ["grad_mass"], "sum_mass_backward": ["gains", "sums"]}),
    ],
    ids=["forward", "backward"],
)  # fmt: skip
def test_every_barrier_of_the_mass_kernels_is_needed(
    arch: str, plan: str, module: Any, arguments: list[Any], buffers: dict[str, list[str]]
) -> None:
    def check_without(number: int) -> None:
        for binary in compile_plan(RACING, [number, *arguments], None, arch, plan):
            for buffer in buffers.get(binary.name, []):
                check_ordered(binary.asm["ttgir"], buffer)

    check_without(-1)
    barriers = Path(module.__file__).read_text(encoding="utf-8").count(racing.BARRIER)
    assert barriers == 4
    for number in range(barriers):
        with pytest.raises(RaceError, match=r"no barrier between two accesses of (grad_)?(mass|gains|sums)"):
            check_without(number)


def test_a_barrier_missing_in_machine_code_is_reported() -> None:
    binary = compile_one("plan_rotate", ["loop"], "sm_90")
    check_barriers_kept(binary.asm)
    lost = binary.asm["ptx"].replace("bar.sync", "// bar.sync", 1)
    with pytest.raises(RaceError, match="the machine code has 1 barriers but the kernel has 2"):
        check_barriers_kept({**binary.asm, "ptx": lost})


@pytest.mark.parametrize("arch", ["sm_80", "sm_90", "gfx942"])
def test_a_tile_with_fewer_channels_than_threads_is_reported(arch: str) -> None:
    inputs = [x.flatten(0, 1) for x in scan_inputs(1, 1, 7, 3, 9, 64).values()]
    schedule = SerialScan(tile=32)
    rows = compile_plan("lowering.gpu.memory_scan.serial.forward", [*inputs, 1.0, 1e-6], schedule, arch)[-1]
    with pytest.raises(RaceError, match="elements of state are held by several threads"):
        check_thread_owned(rows.asm["ttgir"], "state")


@pytest.mark.parametrize("argument", ["states", "history", "grad_state"])
def test_a_backward_tile_with_fewer_channels_than_threads_is_reported(argument: str) -> None:
    with pytest.raises(RaceError, match=f"elements of {argument} are held by several threads"):
        check_thread_owned(backward_rows(64, 32, 64), argument)


def backward_rows(
    value_dim: int, tile: int, threads: int, dtype: torch.dtype = torch.float32, state: torch.dtype | None = None
) -> str:
    sampled = scan_inputs(1, 1, 7, 3, 8, value_dim, dtype=dtype, state_dtype=state)
    inputs = [x.flatten(0, 1) for x in sampled.values()]
    arguments = [inputs[4], inputs[5], inputs[6], *inputs, 1.0, 1e-6, 0.01]
    schedule = SerialScanBackward(tile=tile, threads=threads, checkpoint=3)
    binaries = compile_plan("lowering.gpu.memory_scan.serial.backward", arguments, schedule, "sm_90")
    return next(x for x in binaries if x.name == "scan_rows_backward").asm["ttgir"]


@pytest.mark.parametrize(("value_dim", "tile", "threads"), [(33, 64, 64), (36, 64, 32), (48, 128, 32), (300, 256, 64)])
def test_a_channel_belongs_to_one_thread(value_dim: int, tile: int, threads: int) -> None:
    ttgir = backward_rows(value_dim, tile, threads)
    for argument in ("states", "history", "grad_state"):
        check_thread_owned(ttgir, argument)


def test_a_float64_state_beside_bfloat16_values_has_one_layout() -> None:
    ttgir = backward_rows(128, 128, 32, torch.bfloat16, torch.float64)
    for argument in ("states", "history", "grad_state"):
        check_thread_owned(ttgir, argument)


def test_rows_with_two_layouts_are_reported() -> None:
    with pytest.raises(RaceError, match="states is accessed in 2 layouts; there must be one"):
        check_thread_owned(backward_rows(33, 64, 32), "states")


def test_memory_that_all_threads_access_is_not_thread_owned() -> None:
    inputs = [x.flatten(0, 1) for x in scan_inputs(1, 1, 7, 3, 9, 64, dtype=torch.bfloat16).values()]
    rows = next(
        x
        for x in compile_plan("lowering.gpu.memory_scan.serial.forward", [*inputs, 1.0, 1e-6], SerialScan(), "sm_90")
        if x.name == "scan_rows"
    )
    with pytest.raises(RaceError, match="write_slots is accessed by every thread, not in a blocked layout"):
        check_thread_owned(rows.asm["ttgir"], "write_slots")
    with pytest.raises(ValueError, match="the kernel has no pointer 'unheard'"):
        check_thread_owned(rows.asm["ttgir"], "unheard")
