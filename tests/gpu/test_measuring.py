"""Timing, tuning and the benchmark on this machine's GPU."""

from __future__ import annotations

import importlib.util

import pytest
import torch

from autotune.bench.gpu import part_process, scan
from autotune.bench.gpu.run import GpuRun
from autotune.bench.run import DEFAULT, FLOOR, TUNED, Run
from autotune.measure.cuda_clock import CudaClock, captured
from autotune.measure.gpu_runner import GpuRunner
from ramnet import RamNetConfig
from schedules.kinds import default_schedule
from schedules.of_model import of_model_on_gpu
from schedules.workload import Workload
from tests.gpu.conftest import DEVICE


def test_a_sample_has_the_requested_number_of_calls() -> None:
    calls = torch.zeros((), device=DEVICE)
    seconds = CudaClock().seconds(lambda: calls.add_(1), 7)
    assert int(calls) == 7
    assert seconds > 0


def test_a_graph_computes_the_same_without_calling_anything() -> None:
    x = torch.ones(1000, device=DEVICE)
    y = torch.zeros_like(x)
    calls: list[None] = []

    def small() -> None:
        calls.append(None)
        for _ in range(50):
            y.add_(x)

    replay = captured(small)
    y.zero_()
    calls.clear()
    for _ in range(3):
        replay()
    assert bool((y == 150).all())
    assert not calls


@pytest.mark.parametrize("op", [workload.op for workload in of_model_on_gpu(RamNetConfig.preset("340m"))])
def test_the_default_of_each_op_is_right_and_can_be_timed(target: str, op: str) -> None:
    """Kernels are timed at the tuned sizes and checked at odd sizes."""
    (workload,) = (w for w in of_model_on_gpu(RamNetConfig.preset("340m"), length=1024) if w.op == op)
    runner, schedule = GpuRunner(), default_schedule(workload, target)
    runner.open(workload, target, 1)
    runner.build(schedule)
    runner.check(schedule)
    timing = runner.measure({"default": schedule}, rounds=3, seconds=1.0)["default"]
    assert len(timing.samples) == 3 and min(timing.samples) > 0


@pytest.mark.parametrize("dtype", ["float32", "float16"])
def test_the_default_of_each_op_is_right_in_other_types(target: str, dtype: str) -> None:
    for workload in of_model_on_gpu(RamNetConfig.preset("340m"), 1, 63, 3):
        other = Workload.model_validate(workload.model_dump() | {"dtype": dtype})
        runner, schedule = GpuRunner(), default_schedule(other, target)
        runner.open(other, target, 1)
        runner.build(schedule)
        runner.check(schedule)


def test_the_scans_forms_run_in_the_benchmark(target: str) -> None:
    run = GpuRun(target, quick=True, clock=CudaClock())
    (table,) = scan.memory_scan(run, scan.Sizes(batch=2, heads=4, tokens=512))
    missing = set() if importlib.util.find_spec("tvm") else {"untuned, shared"}
    assert set(table.failed) <= missing | {scan.CUDNN}, table.failed
    assert {TUNED, DEFAULT, FLOOR} <= {row.form for row in table.rows}


def test_a_part_runs_in_a_process_of_its_own(target: str) -> None:
    run = Run(target, quick=True)
    part_process.measured(run, "spills", 300)
    assert any(fact.startswith("bytes of registers spilled") for fact in run.facts)
