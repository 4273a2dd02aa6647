"""The checks for data races fail on kernels that have one."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from lowering.gpu.memory_scan.serial import mass as memory_scan_mass
from lowering.gpu.races import RaceError, check_barriers_kept, check_ordered, check_thread_owned
from lowering.gpu.triton_compiler import Binary
from schedules.gpu import SerialScan
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
def test_every_barrier_of_the_mass_kernels_is_needed(arch: str) -> None:
    arguments, buffers = racing.mass_arguments(), {"walk_mass": ["mass"], "sum_mass": ["gains", "sums"]}

    def check_without(number: int) -> None:
        for binary in compile_plan(RACING, [number, *arguments], None, arch, "plan_mass_without"):
            for buffer in buffers.get(binary.name, []):
                check_ordered(binary.asm["ttgir"], buffer)

    check_without(-1)
    barriers = Path(memory_scan_mass.__file__).read_text(encoding="utf-8").count(racing.BARRIER)
    assert barriers == 4
    for number in range(barriers):
        with pytest.raises(RaceError, match=r"no barrier between two accesses of (mass|gains|sums)"):
            check_without(number)


def test_a_barrier_missing_in_machine_code_is_reported() -> None:
    binary = compile_one("plan_rotate", ["loop"], "sm_90")
    check_barriers_kept(binary.asm)
    lost = binary.asm["ptx"].replace("bar.sync", "// bar.sync", 1)
    with pytest.raises(RaceError, match="the machine code has 1 barriers but the kernel has 2"):
        check_barriers_kept({**binary.asm, "ptx": lost})


def state_rows(
    value_dim: int, tile: int, threads: int, dtype: torch.dtype = torch.float32, state: torch.dtype | None = None,
    arch: str = "sm_90",
) -> str:  # fmt: skip
    sampled = scan_inputs(1, 1, 7, 3, 9, value_dim, dtype=dtype, state_dtype=state)
    inputs = [x.flatten(0, 1) for x in sampled.values()]
    schedule = SerialScan(tile=tile, threads=threads)
    binaries = compile_plan("lowering.gpu.memory_scan.serial.forward", [*inputs, 1.0, 1e-6], schedule, arch)
    return next(x for x in binaries if x.name == "scan_rows").asm["ttgir"]


@pytest.mark.parametrize("arch", ["sm_80", "sm_90", "gfx942"])
def test_a_tile_with_fewer_channels_than_threads_is_reported(arch: str) -> None:
    with pytest.raises(RaceError, match="elements of state are held by several threads"):
        check_thread_owned(state_rows(64, 32, 64, arch=arch), "state")


@pytest.mark.parametrize(("value_dim", "tile", "threads"), [(33, 64, 64), (36, 64, 32), (48, 128, 32), (300, 256, 64)])
def test_a_channel_belongs_to_one_thread(value_dim: int, tile: int, threads: int) -> None:
    check_thread_owned(state_rows(value_dim, tile, threads), "state")


def test_a_float64_state_beside_bfloat16_values_has_one_layout() -> None:
    check_thread_owned(state_rows(128, 128, 32, torch.bfloat16, torch.float64), "state")


def test_rows_with_two_layouts_are_reported() -> None:
    ttgir = state_rows(64, 64, 64)
    layout = next(line for line in ttgir.splitlines() if line.startswith("#blocked ="))
    before, load, after = ttgir.rpartition("tt.load %rows")
    mixed = layout.replace("#blocked", "#other", 1) + "\n" + before + load + after.replace("#blocked>", "#other>", 1)
    with pytest.raises(RaceError, match="state is accessed in 2 layouts; there must be one"):
        check_thread_owned(mixed, "state")


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
