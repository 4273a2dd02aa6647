"""Compiling the schedules that a visit measures: ``python -m autotune.bench.gpu.candidates SHARE OF TARGET``.

Triton compiles a schedule in a second or more, one after another in a process. Here, parallel processes compile a share
each into Triton's cache.
"""

from __future__ import annotations

import os
import sys
import tempfile
from contextlib import suppress
from pathlib import Path

import torch

from autotune.bench.correlation import drawn
from autotune.bench.gpu import kit_kernels
from autotune.bench.gpu.run import GpuRun
from autotune.bench.gpu.together import together
from autotune.bench.run import Table
from autotune.measure.problems import Problem, checked
from lowering.gpu.backend import GpuKernels
from ramnet.config import RamNetConfig
from schedules.base import Schedule
from schedules.of_model import of_model_on_gpu
from schedules.workload import Workload

# How many schedules of an op are correlated with the model, and how many are tried in the model's order.
CORRELATED, TRIED = 20, 12
PROCESSES, SHARE = 14, 0.9


def workloads() -> list[Workload]:
    """Return those of a layer of "340m"."""
    return of_model_on_gpu(RamNetConfig.preset("340m"))


def modelled(workload: Workload, target: str) -> dict[Schedule, float]:
    """Return the modelled seconds in the file ``RAMNET_MODELLED``; none without such a file."""
    path = os.environ.get("RAMNET_MODELLED")
    return kit_kernels.read(Path(path) if path else None, target, workload)


def best(workload: Workload, target: str) -> list[Schedule]:
    """Return the schedules of which the model expects most, the best first."""
    known = modelled(workload, target)
    return sorted(known, key=lambda schedule: known[schedule])[:TRIED]


def compile_all(run: GpuRun) -> list[Table]:
    """Fill Triton's cache. Nothing is measured, so there is no table."""
    command = [sys.executable, "-m", "autotune.bench.gpu.candidates"]
    commands = {str(i): [*command, str(i), str(PROCESSES), run.target] for i in range(PROCESSES)}
    with tempfile.TemporaryDirectory() as folder:
        ended = together(commands, SHARE * run.seconds, Path(folder))
    failed = sum(status != 0 for status in ended.values())
    if failed:
        run.notice(f"{failed} of {PROCESSES} processes that compile candidates did not end in time")
    return []


def _main(share: int, of: int, target: str) -> None:
    torch.set_num_threads(1)
    for workload in workloads():
        schedules = dict.fromkeys([*best(workload, target), *drawn(workload, target)[:CORRELATED]])
        problem = Problem(checked(workload), device="cuda")
        for schedule in list(schedules)[share::of]:
            # What fails will fail again, and be reported, where it is measured.
            with suppress(Exception):
                problem.call(GpuKernels(target, given={workload.op: schedule}))()
                torch.cuda.synchronize()


if __name__ == "__main__":
    _main(int(sys.argv[1]), int(sys.argv[2]), sys.argv[3])
