"""Timing, tuning and the benchmark on the GPU that is here."""

from __future__ import annotations

import importlib.util

import pytest
import torch

from autotune.bench.gpu import apart, scan
from autotune.bench.gpu.run import GpuRun
from autotune.bench.run import DEFAULT, FLOOR, TUNED, Run
from autotune.cuda_clock import CudaClock, captured
from autotune.gpu_measurer import GpuMeasurer
from autotune.measure import interleaved, ratio
from ramnet import RamNetConfig
from schedules.kinds import kind
from schedules.of_model import of_model_on_gpu
from schedules.workload import Workload
from tests.gpu.conftest import DEVICE


def test_twice_the_bytes_take_twice_the_time() -> None:
    source = torch.ones(1 << 28, dtype=torch.uint8, device=DEVICE)
    target = torch.empty_like(source)
    half = source.numel() // 2
    calls = {"one": lambda: target[:half].copy_(source[:half]), "two": lambda: target.copy_(source)}
    found = ratio(interleaved(calls, 9, 5.0, clock=CudaClock()), of="two", over="one")
    assert found.median == pytest.approx(2, rel=0.15)


def test_a_graph_takes_no_longer_than_its_calls_and_computes_the_same() -> None:
    x = torch.ones(1000, device=DEVICE)
    y = torch.zeros_like(x)

    def small() -> None:
        for _ in range(50):
            y.add_(x)

    replay = captured(small)
    y.zero_()
    replay()
    assert bool((y == 50).all())
    timings = interleaved({"graph": replay, "calls": small}, 9, 5.0, clock=CudaClock())
    assert timings["graph"].median < 1.1 * timings["calls"].median


@pytest.mark.parametrize("op", [workload.op for workload in of_model_on_gpu(RamNetConfig.preset("340m"))])
def test_the_default_of_each_op_is_right_and_can_be_timed(target: str, op: str) -> None:
    """At the sizes that are tuned for; the numbers are checked at odd ones."""
    (workload,) = (w for w in of_model_on_gpu(RamNetConfig.preset("340m"), length=1024) if w.op == op)
    measurer, schedule = GpuMeasurer(), kind(op, target).default(workload)
    measurer.open(workload, target, 1)
    measurer.build(schedule)
    measurer.check(schedule)
    timing = measurer.measure({"default": schedule}, rounds=3, seconds=1.0)["default"]
    assert 0 < timing.median < 1


@pytest.mark.parametrize("dtype", ["float32", "float16"])
def test_the_default_of_each_op_is_right_in_other_types(target: str, dtype: str) -> None:
    for workload in of_model_on_gpu(RamNetConfig.preset("340m"), 1, 63, 3):
        other = Workload.model_validate(workload.model_dump() | {"dtype": dtype})
        measurer, schedule = GpuMeasurer(), kind(other.op, target).default(other)
        measurer.open(other, target, 1)
        measurer.build(schedule)
        measurer.check(schedule)


def test_the_scans_forms_run_in_the_benchmark(target: str) -> None:
    run = GpuRun(target, quick=True, clock=CudaClock())
    (table,) = scan.memory_scan(run, scan.Sizes(batch=2, heads=4, tokens=512))
    missing = set() if importlib.util.find_spec("tvm") else {"untuned, shared"}
    assert set(table.failed) <= missing | {scan.CUDNN}, table.failed
    floor = table.row(FLOOR)
    assert floor is not None and all(row.seconds > floor.seconds for row in table.rows if row.form in (TUNED, DEFAULT))


def test_a_part_runs_in_a_process_of_its_own(target: str) -> None:
    run = Run(target, quick=True)
    apart.measured(run, "spills", 300)
    assert any(fact.startswith("bytes of registers spilled") for fact in run.facts)
