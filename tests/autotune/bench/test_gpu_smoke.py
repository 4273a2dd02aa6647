"""The smoke test of kernels, and the parts of a visit that measure with the kit's model."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from autotune.bench import correlation
from autotune.bench.gpu import candidates, smoke, stages
from autotune.bench.gpu.run import GpuRun
from autotune.bench.gpu.smoke import DIFFERS, WRONG, Kernel
from lowering.gpu.backend import GpuKernels
from ramnet.ops import reference
from schedules import records
from schedules.base import Schedule
from schedules.gpu import SCHEDULES
from tests.lowering.gpu.of_340m import workload

STEP = Kernel("memory_step", "", "triton")


@pytest.fixture
def run() -> GpuRun:
    return GpuRun("h100", device="cpu")


def test_every_form_and_compiler_of_every_op_is_tried() -> None:
    found = smoke.kernels()
    assert {kernel.op for kernel in found} == set(SCHEDULES)
    assert {kernel.compiler for kernel in found if kernel.form == "shared"} == {"tir"}
    assert {kernel.compiler for kernel in found if kernel.op == "decode_heads"} == {"triton", "tir"}
    for kernel in found:
        for work in smoke.workloads(kernel.op):
            chosen: Any = smoke.schedule(kernel, work)
            assert chosen.refusal(work) is None and chosen.compiler == kernel.compiler


@pytest.mark.parametrize(("off", "failed", "equal"), [([0, 0, 0], False, True), ([1, 1, 1], True, True),
                                                      ([0, 0, 1e-6], False, False)])  # fmt: skip
def test_a_wrong_kernel_and_one_whose_bits_differ_are_told(
    monkeypatch: pytest.MonkeyPatch, off: list[float], failed: bool, equal: bool
) -> None:
    by_run = iter(off)

    def step(self: Any, *arguments: Any) -> torch.Tensor:
        return reference.memory_step(*arguments) * (1 + next(by_run))

    monkeypatch.setattr(GpuKernels, "memory_step", step)
    (found,) = smoke.tried(STEP, "h100", "cpu")
    assert ("failed" in found, found["equal"]) == (failed, equal)


def test_after_a_fault_a_process_tries_no_other_size(monkeypatch: pytest.MonkeyPatch) -> None:
    def fault(*_: Any) -> None:
        raise RuntimeError("an illegal memory access was encountered")

    monkeypatch.setattr(GpuKernels, "memory_step", fault)
    monkeypatch.setattr(smoke, "TINY", smoke.TINY * 2)
    (found,) = smoke.tried(STEP, "h100", "cpu")
    assert found["failed"] == "RuntimeError: an illegal memory access was encountered"


def test_kernels_that_fault_hang_or_differ_are_counted(run: GpuRun, monkeypatch: pytest.MonkeyPatch) -> None:
    sizes = {"good": [1e-7, True], "differs": [1e-7, False], "faults": [1e-7, True], "hangs": []}

    def together(commands: Any, seconds: float, folder: Path) -> dict[str, int | None]:
        for name, found in sizes.items():
            line = json.dumps({"size": "N=1", "error": found[0], "equal": found[1], "seconds": 1.0}) if found else ""
            (folder / f"{name}.out").write_text(line)
            (folder / f"{name}.err").write_text("noise\nan illegal instruction\n")
        return {"good": 0, "differs": 0, "faults": 1, "hangs": None}

    monkeypatch.setattr(smoke, "together", together)
    smoke.smoke(run)
    assert (run.facts[WRONG], run.facts[DIFFERS]) == (2, 1)
    assert "smoke, faults, size 2: FAILED: exit status 1; an illegal instruction" in run.notices
    assert any(notice.startswith("smoke, differs, N=1: ") and "DIFFER" in notice for notice in run.notices)


@pytest.fixture
def modelled(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> dict[Schedule, float]:
    """The kit's file, with the times of memory_step's schedules."""
    step = workload("memory_step")
    found = {each: 1e-6 * (1 + i) for i, each in enumerate(correlation.drawn(step, "h100"))}
    path = tmp_path / "modelled.json"
    path.write_text(json.dumps({"h100": {step.name: {each.model_dump_json(): s for each, s in found.items()}}}))
    monkeypatch.setenv("RAMNET_MODELLED", str(path))
    monkeypatch.setattr(candidates, "workloads", lambda: [step])
    return found


def test_tuning_begins_with_what_the_model_expects_most_of(
    run: GpuRun, modelled: dict[Schedule, float], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("RAMNET_RECORDS", str(tmp_path))
    monkeypatch.setattr(candidates, "TRIED", 3)
    asked: list[Any] = []
    monkeypatch.setattr("autotune.study.tuner.tune", lambda *_, **named: asked.append(named) or [])
    stages.tune(run)
    (named,) = asked
    assert named["first"] == {workload("memory_step").name: list(modelled)[:3]}
    assert named["records_file"] == tmp_path / "h100.jsonl" and named["journal"].parent == tmp_path
    assert named["budget"].seconds == stages.SHARE * run.seconds


def test_the_kits_model_is_correlated_without_compiling(
    run: GpuRun, modelled: dict[Schedule, float], monkeypatch: pytest.MonkeyPatch
) -> None:
    measured: list[Schedule] = []

    def pairs(runner: Any, default: Schedule, time: float, batch: dict[Schedule, float]) -> list[correlation.Pair]:
        measured.extend(batch)
        return [correlation.Pair(s, batch[s], batch[s], (batch[s], batch[s])) for s in batch]

    class Runs:
        def __init__(self, *_: Any, **__: Any) -> None:
            pass

        def __enter__(self) -> Runs:
            return self

        def __exit__(self, *_: object) -> None:
            pass

        def open(self, *_: Any) -> None:
            pass

        def predict(self, schedule: Schedule) -> Any:
            assert schedule not in modelled, "the default alone is not in the file"
            return type("Prediction", (), {"seconds": 1.0})

        try_out = open

    monkeypatch.setattr(stages, "Worker", Runs)
    monkeypatch.setattr(correlation, "Worker", Runs)
    monkeypatch.setattr(correlation, "_measured", pairs)
    monkeypatch.setattr(candidates, "CORRELATED", 6)
    stages.correlation(run)
    assert measured == list(modelled)[:6]
    assert run.facts == {f"{correlation.FACT}, 1. memory_step": pytest.approx(1.0)}


NCU = """==PROF== Connected
"ID","Kernel Name","gpu__time_duration.sum",\
"dram__bytes_read.sum","{0}barrier_per_issue.ratio","{0}wait_per_issue.ratio"
"","","us","Mbyte","",""
"0","reverse_kernel","812.4","301.2","0.5","2.25"
"""


def test_what_ncu_reads_is_a_line_for_each_kernel(run: GpuRun, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(records, "known", lambda target: [])
    program = tmp_path / "ncu"
    old = 'case "$*" in *--metrics*) echo unknown metric; exit 1;; esac'
    program.write_text(f"#!/bin/sh\n{old}\ncat <<'E'\n{NCU.format(stages.STALL)}E\n")
    program.chmod(0o755)
    monkeypatch.setattr(stages, "ncu", lambda: str(program))
    monkeypatch.setattr(candidates, "workloads", lambda: [workload("memory_scan")])
    stages.profile(run)
    assert run.notices == [
        "ncu, memory_scan: read nothing; unknown metric",
        "ncu, memory_scan: reverse_kernel: gpu__time_duration.sum 812.4 us; dram__bytes_read.sum 301.2 Mbyte;"
        " warps stalled per issue: wait 2.25, barrier 0.50",
    ]


def test_without_ncu_a_notice_says_so(run: GpuRun, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(stages, "ncu", lambda: None)
    stages.profile(run)
    assert run.notices == ["ncu is not installed; no kernel was profiled"]
