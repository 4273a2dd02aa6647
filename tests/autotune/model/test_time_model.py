"""The time model: occupancy computed by hand, monotonicity, and rejected binaries."""

from __future__ import annotations

from dataclasses import replace

import pytest

from autotune.model import cpu as time_model_cpu
from autotune.model import gpu as time_model
from autotune.model.cpu import Machine
from autotune.model.gpu import RejectedError, check, estimate, explain, resident, seconds
from lowering.gpu.resources import Compiled, Resources, Work
from lowering.targets import TARGETS, gpu_of
from schedules.cpu import SCHEDULES, AddressDecode, MemoryScan, MemoryScanBackward
from schedules.workload import Workload

GPUS = [name for name, target in TARGETS.items() if target.gpu is not None]
WORK = Work(
    programs=256, threads=64, dram_bytes=1e8, cache_bytes=1e9, steps=4096, trips=2, shared_trips=3,
    barriers=1, shared_bytes=1e8,
)  # fmt: skip
NEEDS = Resources(registers=64, spilled=0, local=0, shared=0)
INSTRUCTIONS = 1e5


def launch(gpu: str = "a100", **changes: float) -> Compiled:
    """WORK, NEEDS and INSTRUCTIONS with changes."""
    work = {name: value for name, value in changes.items() if hasattr(WORK, name)}
    needs = {name: value for name, value in changes.items() if hasattr(NEEDS, name)}
    instructions = changes.get("instructions", INSTRUCTIONS)
    return Compiled("kernel", replace(WORK, **work), replace(NEEDS, **needs), instructions)


@pytest.mark.parametrize(
    ("target", "threads", "registers", "shared", "programs"),
    [
        # 64 registers of 128 threads are 8192 of 65536.
        ("a100", 128, 64, 0, 8),
        # 33 round up to 40: 1280 a warp, 12 warps in each quarter of 16384, 48 in all, 6 programs of 8.
        ("a100", 256, 33, 0, 6),
        # 255 round up to 256: 2 warps a quarter, 8 in all.
        ("h100", 32, 255, 0, 8),
        # 2048 threads are 2 programs of 1024, whatever else there is.
        ("a100", 1024, 32, 0, 2),
        # 32 programs at most, with a warp each.
        ("a100", 32, 16, 0, 32),
        # 1536 threads, 24 programs at most.
        ("l4", 64, 16, 0, 24),
        # 100 KB less 1 KB a program: three of 32 KB.
        ("rtx3090", 32, 32, 32 << 10, 3),
        ("a100", 32, 32, 163 << 10, 1),
        # A wave of 64 lanes: 512 registers of a lane by each of four schedulers, in eights.
        ("mi300x", 256, 128, 0, 4),
        ("mi300x", 64, 24, 60 << 10, 1),
        # 64 KB, none of which the system takes.
        ("mi300x", 64, 24, 32 << 10, 2),
        # 255 registers of 1024 threads are more than there are.
        ("a100", 1024, 255, 0, 0),
    ],
)
def test_programs_on_a_processor_are_as_counted_by_hand(
    target: str, threads: int, registers: int, shared: int, programs: int
) -> None:
    assert resident(threads, Resources(registers, 0, 0, shared), gpu_of(target)) == programs


def test_waves_and_occupancy_follow() -> None:
    gpu = gpu_of("a100")
    found = estimate(launch(threads=128, programs=108 * 8 + 1), gpu)
    assert (found.resident, found.waves, found.occupancy) == (8, 2, 0.5)


def test_each_term_is_as_counted_by_hand() -> None:
    """216 programs of 64 threads are two on each of 108 processors, all at once; 8 bytes of each thread are spilled."""
    gpu = replace(gpu_of("a100"), clock=1e9, bandwidth=1e12, l2=1 << 20)
    found = estimate(
        Compiled(
            "kernel",
            Work(programs=216, threads=64, dram_bytes=1e6, cache_bytes=5e6, steps=10, trips=2,
                 shared_trips=3, barriers=1, shared_bytes=1e6, reused_bytes=4 << 20),
            Resources(registers=64, spilled=8, local=8, shared=0),
            instructions=100,
        ),
        gpu,
    )  # fmt: skip
    model = time_model
    spilled = 2 * 8 * 64 * 216 * 10
    memory = 1e6 + 0.75 * (5e6 + spilled - 1e6)
    assert found.waves == 1
    assert found.memory == pytest.approx(memory / (1e12 * model.DRAM_SHARE))
    assert found.cache == pytest.approx((5e6 + spilled) / (108 * model.L2_BYTES_A_CYCLE * 1e9))
    assert found.shared == pytest.approx(1e6 / (108 * model.SHARED_BYTES_A_CYCLE * 1e9))
    assert found.arithmetic == pytest.approx(2 * 64 * 100 / (model.LANES * 1e9))
    latency = 0.25 * model.L2_LATENCY + 0.75 * model.DRAM_LATENCY
    step = 2 * latency + 3 * model.SHARED_LATENCY + model.BARRIER_LATENCY
    assert found.chain == pytest.approx((10 * step + 100 * model.ISSUE_CYCLES) / 1e9)
    few = estimate(launch(programs=54, cache_bytes=1e9), gpu)
    assert few.cache == pytest.approx(1e9 / (54 * model.L2_BYTES_A_CYCLE * 1e9)), "half of the processors"


@pytest.mark.parametrize("target", GPUS)
@pytest.mark.parametrize(
    "name",
    ["programs", "dram_bytes", "cache_bytes", "instructions", "steps", "trips", "shared_trips", "barriers",
     "shared_bytes", "reused_bytes", "registers", "shared", "spilled"],
)  # fmt: skip
def test_more_is_never_faster(target: str, name: str) -> None:
    if name == "programs":  # each with as much to do as before

        def grown(n: float) -> Compiled:
            whole = ("dram_bytes", "cache_bytes", "shared_bytes")
            return launch(programs=int(64 * n), threads=64, **dict.fromkeys(whole, 1000000.0 * 64 * n))
    else:

        def grown(n: float) -> Compiled:
            unit = {"registers": 8, "shared": 4096, "reused_bytes": 3e7, "dram_bytes": 1e8, "cache_bytes": 3e8,
                    "instructions": 3e5, "shared_bytes": 3e9, "steps": 300}.get(name, 1)  # fmt: skip
            return launch(**{name: type(unit)(unit * n)})  # type: ignore[arg-type]

    times = [seconds([grown(n)], gpu_of(target)) for n in range(1, 13)]
    assert times == sorted(times)
    assert name in ("registers", "shared") or times[-1] > times[0]


@pytest.mark.parametrize("name", ["bandwidth", "l2", "clock", "processors"])
def test_a_larger_gpu_is_never_slower(name: str) -> None:
    gpu = gpu_of("a100")
    larger = replace(gpu, **{name: 2 * getattr(gpu, name)})
    work = [launch(reused_bytes=1e8)]
    assert seconds(work, larger) < seconds(work, gpu)


def test_a_state_larger_than_l2_comes_from_memory() -> None:
    gpu = gpu_of("a100")
    inside, outside = (estimate(launch(reused_bytes=size), gpu) for size in (gpu.l2, 2 * gpu.l2))
    assert inside.memory == estimate(launch(), gpu).memory
    assert outside.memory == pytest.approx((1e8 + 0.5 * 9e8) / (gpu.bandwidth * time_model.DRAM_SHARE))
    assert outside.chain > inside.chain


@pytest.mark.parametrize(
    ("changes", "binds"),
    [
        ({"dram_bytes": 1e11, "cache_bytes": 1e11}, "memory"),
        ({"dram_bytes": 1.0, "cache_bytes": 1e12}, "cache"),
        ({"shared_bytes": 1e13}, "shared"),
        ({"instructions": 2e5, "programs": 10**6}, "arithmetic"),
        ({"steps": 1e6, "dram_bytes": 1.0, "cache_bytes": 1.0, "instructions": 1.0}, "chain"),
        ({"steps": 1, "dram_bytes": 1.0, "cache_bytes": 1.0, "instructions": 1.0, "shared_bytes": 1.0}, "launch"),
    ],
)
def test_the_longest_term_is_named(changes: dict[str, float], binds: str) -> None:
    (found,) = explain([launch(**changes)], gpu_of("a100"))
    assert found.binds == binds
    assert found.seconds >= max(found.terms.values())


def test_launches_run_one_after_another() -> None:
    gpu = gpu_of("h200")
    assert seconds([launch(), launch()], gpu) == pytest.approx(2 * seconds([launch()], gpu))


@pytest.mark.parametrize(
    ("target", "changes", "status", "reason"),
    [
        ("a100", {"spilled": 12, "registers": 255}, "spills", "kernel spills 12 bytes of a thread's 255 registers"),
        ("l4", {"shared": 100 << 10}, "shared_memory", r"needs 102400 bytes of shared memory; sm_89 has 101376"),
        ("mi300x", {"threads": 32}, "threads", "programs of 32 threads; gfx942 takes 64 to 1024"),
        ("a100", {"threads": 2048}, "threads", "programs of 2048 threads"),
        ("a100", {"threads": 1024, "registers": 128}, "registers", "128 registers for 1024 threads"),
    ],
)
def test_rejections_say_why(target: str, changes: dict[str, float], status: str, reason: str) -> None:
    with pytest.raises(RejectedError, match=reason) as found:
        check(launch(**changes), gpu_of(target))
    assert found.value.status == status


@pytest.mark.parametrize("changes", [{}, {"threads": 32}, {"threads": 1024, "registers": 64}, {"shared": 163 << 10}])
def test_a_valid_binary_passes(changes: dict[str, float]) -> None:
    check(launch(**changes), gpu_of("a100"))


def test_the_estimate_of_what_does_not_fit_says_why() -> None:
    with pytest.raises(RejectedError, match="needs 255 registers for 1024 threads") as found:
        seconds([launch(threads=1024, registers=255)], gpu_of("a100"))
    assert found.value.status == "registers"


MACHINE = Machine(vector=32, l2=1 << 20, from_l2=9e10, from_far=1e10, threads=2)
CONSTANTS = {"decay_power": 1.0, "eps": 1e-6}
STATE = {"K": 8, "M": 1024, "D": 64}
SCAN = Workload(op="memory_scan", shape={"N": 16, "T": 1024, **STATE}, constants=CONSTANTS)
ROWS = Workload(op="address_decode", shape={"R": 32768, "U": 5, "P": 4, "K": 8})


def cpu_seconds(workload: Workload, schedule: object, machine: Machine = MACHINE) -> float:
    return time_model_cpu.seconds(workload, schedule, machine)


@pytest.mark.parametrize("op", ["memory_scan", "memory_scan_backward", "memory_step", "address_decode",
                                "address_decode_backward"])  # fmt: skip
def test_on_a_cpu_more_is_never_faster(op: str) -> None:
    shape = {"memory_scan": SCAN.shape, "memory_scan_backward": SCAN.shape, "memory_step": {"N": 16, **STATE}}
    workload = Workload(op=op, shape=shape.get(op, ROWS.shape), constants=CONSTANTS)  # type: ignore[arg-type]
    default = SCHEDULES[op].default(workload)
    before = cpu_seconds(workload, default)
    assert before > 0
    for axis in set("NTKDR") & set(workload.shape):
        larger = workload.model_copy(update={"shape": {**workload.shape, axis: 2 * workload.shape[axis]}})
        assert cpu_seconds(larger, default) > before, axis


def test_on_a_cpu_narrow_tiles_and_lanes_waste_vectors() -> None:
    tiles = [cpu_seconds(SCAN, MemoryScan(tile=tile, groups=1, chunk=64, unroll=8)) for tile in (4, 8, 16)]
    assert tiles == sorted(tiles, reverse=True)
    lanes = [cpu_seconds(ROWS, AddressDecode(lanes=n, unroll=2, parallel=True)) for n in (4, 8)]
    assert lanes == sorted(lanes, reverse=True)


def test_on_a_cpu_a_history_beyond_l2_costs() -> None:
    backward = SCAN.model_copy(update={"op": "memory_scan_backward", "constants": {**CONSTANTS, "proxy_eps": 0.01}})
    small, large = (replace(MACHINE, l2=size) for size in (1 << 18, 1 << 24))
    schedule = MemoryScanBackward(tile=32, unroll=8)
    assert cpu_seconds(backward, schedule, small) > cpu_seconds(backward, schedule, large)


def test_on_a_cpu_threads_share_what_they_can() -> None:
    alone = replace(MACHINE, threads=1)
    serial, parallel = (AddressDecode(lanes=8, unroll=1, parallel=p) for p in (False, True))
    assert cpu_seconds(ROWS, serial) == cpu_seconds(ROWS, serial, alone)
    assert cpu_seconds(ROWS, parallel) < 0.6 * cpu_seconds(ROWS, parallel, alone)
