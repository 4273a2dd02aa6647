"""The GPUs' schedules: both sides of each limit, the defaults, and the search space.

Form slots is in test_gpu_slots.py.
"""

from __future__ import annotations

import itertools
import re
from typing import Any

import pytest

from schedules.base import Schedule, combinations
from schedules.gpu import (
    SCHEDULES,
    AddressDecode,
    AddressDecodeBackward,
    DecodeHeads,
    MemoryStep,
    SerialScan,
    SharedScan,
    SharedScanBackward,
    SlotsScan,
    shared,
)  # fmt: skip
from schedules.gpu.address import exchanges, straight_exchanges
from schedules.kinds import default_schedule, schedule_of
from schedules.workload import AXES, Op, Workload, heads_of

SIZES = {"N": 256, "T": 4096, "K": 8, "M": 1024, "D": 64, "R": 32768, "U": 5, "P": 4}


def work(op: Op, dtype: Any = "bfloat16", **sizes: int) -> Workload:
    return Workload(op=op, shape={axis: (SIZES | sizes)[axis] for axis in AXES[op]}, dtype=dtype)


SCAN, BACK, STEP = work("memory_scan"), work("memory_scan_backward"), work("memory_step")
ADDRESS, GRADIENT, HEADS = work("address_decode"), work("address_decode_backward"), work("decode_heads")


@pytest.mark.parametrize(
    ("schedule", "workload"),
    [
        (AddressDecode(threads=32), ADDRESS), (AddressDecode(threads=1024), ADDRESS),
        (AddressDecode(unroll=0), work("address_decode", K=64)), (AddressDecode(unroll=2), ADDRESS),
        (AddressDecodeBackward(), work("address_decode_backward", K=64)),
        (MemoryStep(threads=32), STEP),
        (DecodeHeads(threads=32), work("decode_heads", K=16)),
        (SerialScan(), work("memory_scan", K=16)), (SerialScan(tile=128, threads=32), work("memory_scan", D=68)),
        (SerialScan(tile=128, threads=64), work("memory_scan", D=68)),
        (SerialScan(tile=64, threads=64), work("memory_scan", D=63)),
        (SharedScan(slot_lanes=8, chunk=8), SCAN),
        (SharedScan(channels=2, chunk=8, slot_lanes=8), work("memory_scan", D=66)),
        (SharedScan(slot_lanes=8, chunk=8), work("memory_scan", N=65535)),
    ],
)  # fmt: skip
def test_schedules_at_a_limit_are_valid(schedule: Schedule, workload: Workload) -> None:
    assert schedule.refusal(workload) is None


@pytest.mark.parametrize(
    ("schedule", "workload", "sentence"),
    [
        *((made(threads=n), workload, f"threads is {n}; it must be a power of two in 32..1024")
          for made, workload in ((AddressDecode, ADDRESS), (AddressDecodeBackward, GRADIENT), (MemoryStep, STEP),
                                 (DecodeHeads, HEADS), (SerialScan, SCAN))
          for n in (0, -32, 16, 48, 2048)),
        (AddressDecode(unroll=3), ADDRESS, "unroll is 3; it must be 0, 1 or 2"),
        (AddressDecode(unroll=2), work("address_decode", K=32),
         "unroll 2 unrolls 990 compare-exchanges; at most 400 are allowed"),
        (AddressDecode(unroll=0), work("address_decode", K=65),
         "K is 65; a thread's registers hold at most 64 addresses"),
        (AddressDecodeBackward(), work("address_decode_backward", K=65),
         "K is 65; a thread's registers hold at most 64 addresses"),
        (DecodeHeads(threads=32), work("decode_heads", K=17), "threads is 32; it must be at least 64"),
        (SerialScan(), work("memory_scan", K=17), "K is 17; form serial supports at most 16 slots per token"),
        (SerialScan(spans=0), SCAN, "spans is 0; it must be 1 or more"),
        (SerialScan(tile=96), SCAN, "tile is 96; it must be a power of two"),
        (SerialScan(tile=0), SCAN, "tile is 0; it must be a power of two"),
        (SerialScan(tile=32), SCAN,
         "tile is 32; it must be at least threads = 64, so that no two threads share a channel"),
        (SerialScan(tile=256, threads=32), SCAN, "tile is 256; it must be at most 4 · threads = 128"),
        (SerialScan(tile=128), work("memory_scan", D=66),
         "tile is 128; it must be at most threads = 64, as D = 66 is not a multiple of 4"),
        (SerialScan(tile=128), SCAN, "tile is 128; it must be at most threads = 64 or less than 2 · D = 128"),
        (SharedScanBackward(heads=-1), BACK,
         "heads is -1; it must be 0, for all heads, or the number of heads per group"),
        (SharedScan(slot_lanes=16), SCAN, "slot_lanes is 16; it must be a power of two up to 32 that divides K = 8"),
        (SharedScan(slot_lanes=3), SCAN, "slot_lanes is 3; it must be a power of two up to 32 that divides K = 8"),
        (SharedScan(channels=3), SCAN,
         "channels is 3; it must be 1, 2 or 4, divide D = 64, and be at most 16 bytes of sums"),
        (SharedScan(channels=4), work("memory_scan", D=66),
         "channels is 4; it must be 1, 2 or 4, divide D = 66, and be at most 16 bytes of sums"),
        (SharedScan(channels=4), work("memory_scan", "float64"),
         "channels is 4; it must be 1, 2 or 4, divide D = 64, and be at most 16 bytes of sums"),
        (SharedScan(slot_lanes=8), work("memory_scan", N=65536),
         "a launch has 65536 heads; form shared supports at most 65535"),
        (SharedScan(slot_lanes=8, chunk=0), SCAN, "chunk is 0; it must be 1 or more"),
        # 2 slots and 2 weights for each of K, and a tile of 128 channels: 160 numbers per token, 5 per thread.
        (SharedScan(chunk=20), SCAN, "chunk is 20; a thread would hold 100 of its operands; at most 96 fit"),
        # 1024 rows of 128 channels and a mass.
        (SharedScan(chunk=8), SCAN,
         f"a program needs {1024 * 129 * 4 + 8 * 160 * 4} bytes of shared memory; the limit is 232448"),
    ],
)  # fmt: skip
def test_schedules_beyond_a_limit_are_refused(schedule: Schedule, workload: Workload, sentence: str) -> None:
    assert schedule.refusal(workload) == sentence


def test_the_backward_of_form_shared_needs_more_than_its_forward() -> None:
    small = work("memory_scan", M=256), work("memory_scan_backward", M=256)
    knobs: dict[str, Any] = {"slot_lanes": 4, "chunk": 16}
    assert SharedScan(**knobs).refusal(small[0]) is None
    # 5 arrays by slot, and one of 8 slots and 32 channels in bfloat16, of which a word holds 2.
    held = 16 * (7 * 8 + 2 * 32 + 8 * 32 // 2) // 32
    assert SharedScanBackward(**knobs).refusal(small[1]) == (
        f"chunk is 16; a thread would hold {held} of its operands; at most 96 fit"
    )
    assert SharedScanBackward(**knobs | {"chunk": 8, "heads": 3}).refusal(small[1]) is None


def test_the_sizes_of_form_shared() -> None:
    knobs = SharedScan(slot_lanes=4, channels=2)
    assert knobs.tile == 16
    assert [knobs.tiles(work("memory_scan", D=d)) for d in (16, 17, 64)] == [1, 2, 4]
    assert [shared.word(work("memory_scan", dtype)) for dtype in ("bfloat16", "float32", "float64")] == [4, 4, 8]
    kept = {dtype: shared.history_type(work("memory_scan", dtype)) for dtype in ("bfloat16", "float16", "float64")}
    assert kept == {"bfloat16": "bfloat16", "float16": "float32", "float64": "float64"}
    collisions = [SharedScan(slot_lanes=lanes, channels=1).collisions(SCAN) for lanes in (1, 2, 32)]
    assert collisions == [1.0, 1.5, 3.53]


@pytest.mark.parametrize(
    ("workload", "default"),
    [
        (ADDRESS, AddressDecode()), (work("address_decode", P=16, K=32), AddressDecode(unroll=0)),
        (GRADIENT, AddressDecodeBackward()), (STEP, MemoryStep()),
        (HEADS, DecodeHeads()), (work("decode_heads", K=33), DecodeHeads(threads=128, unroll=0)),
        # T · K / (2 · M) = 4096 · 8 / 2048 = 16.
        (SCAN, SerialScan(spans=16)), (work("memory_scan", T=8192), SerialScan(spans=16)),
        (work("memory_scan", T=4095), SerialScan(spans=8)), (work("memory_scan", T=1), SerialScan(spans=1)),
        (BACK, SlotsScan()), (work("memory_scan_backward", T=1), SlotsScan()),
        (work("memory_scan", K=17), SlotsScan()),
        (work("memory_scan", K=17, D=257), SlotsScan(threads=128)),
        (work("memory_scan_backward", K=17, D=256), SlotsScan()),
    ],
)  # fmt: skip
def test_defaults(workload: Workload, default: Schedule) -> None:
    assert default_schedule(workload, "h200") == default
    assert default.refusal(workload) is None


@pytest.mark.parametrize(
    ("workload", "knobs"),
    [
        (SCAN, (4, 8)), (BACK, (4, 8)),  # 16 channels
        (work("memory_scan", "float64"), (2, 4)),  # 16 bytes hold 2 channels
        (work("memory_scan", K=7), (1, 1)),  # a token's slots are not divided, so a warp has 32 channels
        (work("memory_scan", M=4096), (2, 8)),  # 16 channels of so many slots do not fit
    ],
)  # fmt: skip
def test_the_default_of_form_shared_has_16_channels_or_nearly(workload: Workload, knobs: tuple[int, int]) -> None:
    default = SCHEDULES[workload.op]["shared"].default(workload)
    assert (default.channels, default.slot_lanes) == knobs  # type: ignore[attr-defined]
    assert default.refusal(workload) is None


@pytest.mark.parametrize(
    ("sub_dim", "top_k", "unroll", "counted"),
    [
        # In loops, each of 4 digits is compared at 4 places, and each of 3 merges is a bitonic network of 12.
        (4, 8, 0, (16, 36)),
        # Unrolled, 4 digits are sorted by 6. 4 prefixes of the second digit can survive: inserted 1, 3, 5 and 7 places
        # from the end they need 16, more than the network's 12. Of the third digit 2 can (3 + 6), of the fourth 2
        # (1 + 5).
        (4, 8, 1, (6, 12 + 9 + 6)),
        (2, 1, 1, (1, 0)),
        (8, 2, 1, (1 + 6 * 2, 1)),
    ],
)
def test_compare_exchanges_are_counted(sub_dim: int, top_k: int, unroll: int, counted: tuple[int, int]) -> None:
    assert exchanges(sub_dim, top_k, unroll) == counted


def test_the_code_of_one_sub_vector_or_of_all_is_unrolled() -> None:
    sorting, joining = exchanges(4, 8, 1)
    assert [straight_exchanges(ADDRESS, unroll) for unroll in (0, 1, 2)] == [
        0, 2 * sorting + joining, 5 * sorting + 4 * joining,
    ]  # fmt: skip


@pytest.mark.parametrize("op", SCHEDULES)
def test_defaults_are_valid_for_all_sizes(op: Op) -> None:
    for size, top_k in itertools.product((2, 3, 48, 1009), (1, 3, 33)):
        workload = work(op, **dict.fromkeys("NTDRPM", size), K=top_k, U=2)
        assert default_schedule(workload, "h200").refusal(workload) is None, workload.name


@pytest.mark.parametrize("op", ["memory_scan", "memory_scan_backward"])
def test_each_form_searches_all_its_knobs_and_some_schedules_are_valid(op: Op) -> None:
    workload = work(op, M=256)
    for form, kind in SCHEDULES[op].items():
        space = kind.space(workload)
        assert {*space, "form"} == {*kind.model_fields}
        found = list(combinations(kind, space))
        assert {each.form for each in found} == {form}  # type: ignore[attr-defined]
        assert any(each.refusal(workload) is None for each in found)


def test_knobs_of_other_forms_are_ignored() -> None:
    for op, kind in (("memory_scan", SharedScan), ("memory_scan_backward", SharedScanBackward)):
        assert schedule_of(op, "a100", {"form": "shared", "chunk": 8}) == kind(chunk=8)
        # Older records have the knobs of all forms.
        assert schedule_of(op, "a100", {"form": "shared", "chunk": 8, "tile": 64, "spans": 2}) == kind(chunk=8)


def test_knobs_of_a_form_that_was_removed_are_ignored() -> None:
    old = {"form": "slots", "tile": 64, "spans": 2, "checkpoint": 256}
    assert schedule_of("memory_scan_backward", "a100", old) == SlotsScan()


@pytest.mark.parametrize(
    ("op", "knobs", "problem"),
    [
        ("memory_scan", {"form": "sorted"}, "form is 'sorted'; it must be one of serial, slots, shared"),
        ("memory_scan", {"tile": 64}, "form is None; it must be one of serial, slots, shared"),
        ("memory_scan", {"form": ["slots"]}, "form is ['slots']; it must be one of serial, slots, shared"),
        ("memory_scan", {"form": "slots", "depth": 3}, "depth"),
        # Only the backward had this knob.
        ("memory_scan", {"form": "serial", "checkpoint": 64}, "checkpoint"),
        ("memory_step", {"form": "slots"}, "form"),
        ("attention", {}, "attention has no kernel for a100; there are address_decode, address_decode_backward,"),
    ],
)
def test_unknown_forms_and_knobs_are_refused(op: Op, knobs: dict[str, Any], problem: str) -> None:
    with pytest.raises(ValueError, match=re.escape(problem)):
        schedule_of(op, "a100", knobs)


def test_a_layer_has_16_heads_if_they_divide_n() -> None:
    assert [heads_of(work("decode_heads", N=n)) for n in (16, 64, 24, 1)] == [16, 16, 24, 1]
