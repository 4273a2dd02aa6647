"""The CPU's schedules: both sides of each limit, the defaults, and the search space."""

from __future__ import annotations

import itertools
from typing import Any

import pytest

from schedules.base import Schedule
from schedules.cpu import (
    SCHEDULES,
    AddressDecode,
    AddressDecodeBackward,
    MemoryScan,
    MemoryScanBackward,
    MemoryStep,
)  # fmt: skip
from schedules.kinds import default_schedule
from schedules.workload import AXES, Op, Workload

SIZES = {"N": 16, "T": 1024, "K": 8, "M": 1024, "D": 64, "R": 32768, "U": 5, "P": 4}


def work(op: Op, dtype: Any = "float32", **sizes: int) -> Workload:
    return Workload(op=op, shape={axis: (SIZES | sizes)[axis] for axis in AXES[op]}, dtype=dtype)


SCAN, BACK, STEP = work("memory_scan"), work("memory_scan_backward"), work("memory_step")
ADDRESS, GRADIENT = work("address_decode"), work("address_decode_backward")


def scan(tile: int = 32, groups: int = 1, chunk: int = 64, unroll: int = 8) -> MemoryScan:
    return MemoryScan(tile=tile, groups=groups, chunk=chunk, unroll=unroll)


def back(tile: int = 32, unroll: int = 8) -> MemoryScanBackward:
    return MemoryScanBackward(tile=tile, unroll=unroll)


def step(tile: int = 32, unroll: int = 8) -> MemoryStep:
    return MemoryStep(tile=tile, unroll=unroll, parallel=False, prefetch=0)


def address(lanes: int = 16, unroll: int = 1) -> AddressDecode:
    return AddressDecode(lanes=lanes, unroll=unroll, parallel=True)


def gradient(lanes: int) -> AddressDecodeBackward:
    return AddressDecodeBackward(lanes=lanes, parallel=True)


@pytest.mark.parametrize(
    ("schedule", "workload"),
    [
        (scan(tile=64), SCAN), (scan(tile=1), SCAN), (scan(groups=64, tile=1), SCAN), (scan(groups=2, tile=32), SCAN),
        (scan(chunk=1), SCAN), (scan(chunk=65536), SCAN), (scan(unroll=1), SCAN),
        (back(tile=64), BACK), (back(unroll=1), BACK),
        (step(tile=64), STEP), (step(unroll=1), STEP),
        (address(lanes=1), ADDRESS), (address(lanes=255), ADDRESS),
        (address(lanes=127), work("address_decode", "float64")),
        (address(unroll=0), work("address_decode", R=1)), (address(unroll=2), work("address_decode", R=256)),
        (gradient(255), GRADIENT), (gradient(127), work("address_decode_backward", "float64")),
    ],
)  # fmt: skip
def test_schedules_at_a_limit_are_valid(schedule: Schedule, workload: Workload) -> None:
    assert schedule.refusal(workload) is None
    schedule.require(workload)


@pytest.mark.parametrize(
    ("schedule", "workload", "sentence"),
    [
        (scan(groups=0), SCAN, "groups is 0, which does not divide D = 64"),
        (scan(groups=-1), SCAN, "groups is -1, which does not divide D = 64"),
        (scan(groups=3), SCAN, "groups is 3, which does not divide D = 64"),
        (scan(groups=4, tile=32), SCAN, "tile is 32, which does not divide D / groups = 16"),
        (scan(tile=0), SCAN, "tile is 0, which does not divide D / groups = 64"),
        (scan(unroll=0), SCAN, "unroll is 0; it must be in 1..K = 8"),
        (scan(unroll=9), SCAN, "unroll is 9; it must be in 1..K = 8"),
        (scan(chunk=0), SCAN, "chunk is 0; it must be in 1..65536"),
        (scan(chunk=65537), SCAN, "chunk is 65537; it must be in 1..65536"),
        (back(tile=128), BACK, "tile is 128, which does not divide D = 64"),
        (back(unroll=9), BACK, "unroll is 9; it must be in 1..K = 8"),
        (step(tile=3), STEP, "tile is 3, which does not divide D = 64"),
        (step(unroll=0), STEP, "unroll is 0; it must be in 1..K = 8"),
        (address(unroll=3), ADDRESS, "unroll is 3; it must be 0, 1 or 2"),
        (address(unroll=-1), ADDRESS, "unroll is -1; it must be 0, 1 or 2"),
        (address(), work("address_decode", P=8, K=16),
         "288 exchanges a sub-vector are more than the 150 that straight code takes"),
        (address(), work("address_decode", R=255), "straight code for 255 rows, under 256, is built for nothing"),
        (address(lanes=256), ADDRESS, "256 lanes are 1024 bytes; they must be in 1..1023"),
        (address(lanes=128), work("address_decode", "float64"), "128 lanes are 1024 bytes; they must be in 1..1023"),
        (address(lanes=0), ADDRESS, "0 lanes are 0 bytes; they must be in 1..1023"),
        (gradient(256), GRADIENT, "256 lanes are 1024 bytes; they must be in 1..1023"),
    ],
)  # fmt: skip
def test_schedules_beyond_a_limit_are_refused(schedule: Schedule, workload: Workload, sentence: str) -> None:
    assert schedule.refusal(workload) == sentence
    with pytest.raises(ValueError, match=f"^{workload.op}: "):
        schedule.require(workload)


@pytest.mark.parametrize(
    ("workload", "default"),
    [
        (SCAN, scan(tile=32)), (work("memory_scan", D=24, K=3), scan(tile=24, unroll=3)),
        (work("memory_scan", D=66), scan(tile=22)),
        (BACK, back(tile=32)), (work("memory_scan_backward", D=7, K=2), back(tile=7, unroll=2)),
        (STEP, MemoryStep(tile=64, unroll=8, parallel=False, prefetch=0)),
        (work("memory_step", D=128, K=16), MemoryStep(tile=64, unroll=8, parallel=False, prefetch=0)),
        (work("memory_step", N=256), MemoryStep(tile=64, unroll=8, parallel=False, prefetch=0)),
        (work("memory_step", N=257), MemoryStep(tile=64, unroll=8, parallel=True, prefetch=0)),
        (work("memory_step", M=2**14 - 1), MemoryStep(tile=64, unroll=8, parallel=False, prefetch=0)),
        (work("memory_step", M=2**14), MemoryStep(tile=64, unroll=8, parallel=False, prefetch=1)),
        (ADDRESS, AddressDecode(lanes=16, unroll=1, parallel=True)),
        (work("address_decode", R=256), AddressDecode(lanes=16, unroll=1, parallel=True)),
        (work("address_decode", R=255), AddressDecode(lanes=16, unroll=0, parallel=False)),
        (work("address_decode", P=8, K=16), AddressDecode(lanes=16, unroll=0, parallel=True)),
        (GRADIENT, gradient(16)),
        (work("address_decode_backward", R=255), AddressDecodeBackward(lanes=16, parallel=False)),
    ],
)  # fmt: skip
def test_defaults(workload: Workload, default: Schedule) -> None:
    assert default_schedule(workload, "cpu") == default


@pytest.mark.parametrize(
    ("workload", "space"),
    [
        (SCAN, {"tile": (4, 8, 16, 32, 64), "groups": (1, 2, 4), "chunk": (16, 64, 256, 1024), "unroll": (1, 2, 4, 8)}),
        (work("memory_scan", D=3, K=3), {"tile": (3,), "groups": (1, 2, 4), "chunk": (16, 64, 256, 1024),
                                         "unroll": (1, 2)}),
        (work("memory_scan_backward", D=256, K=32), {"tile": (4, 8, 16, 32, 64, 128), "unroll": (1, 2, 4, 8, 16)}),
        (STEP, {"tile": (4, 8, 16, 32, 64), "unroll": (1, 2, 4, 8), "parallel": (False, True), "prefetch": (0, 1, 2)}),
        (ADDRESS, {"lanes": (4, 8, 16, 32), "unroll": (0, 1, 2), "parallel": (False, True)}),
        (work("address_decode", R=1), {"lanes": (4, 8, 16, 32), "unroll": (0,), "parallel": (False, True)}),
        (GRADIENT, {"lanes": (4, 8, 16, 32), "parallel": (False, True)}),
    ],
)  # fmt: skip
def test_the_search_space(workload: Workload, space: dict[str, tuple[Any, ...]]) -> None:
    assert SCHEDULES[workload.op].space(workload) == space


@pytest.mark.parametrize("op", SCHEDULES)
def test_defaults_are_valid_for_all_sizes(op: Op) -> None:
    for size, dtype in itertools.product((1, 2, 3, 5, 48, 1009), ("float32", "float64")):
        sizes = dict.fromkeys("NTKDRP", size) | {"U": 1, "M": max(size, 2)}
        workload = work(op, dtype, **sizes)
        assert default_schedule(workload, "cpu").refusal(workload) is None, workload.name
