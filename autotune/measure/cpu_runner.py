"""A worker's runner for a CPU: builds a schedule's kernel, checks its results and times it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch

from autotune.measure.problems import OneKernel, Problem, checked
from autotune.measure.timing import Timing, interleaved
from lowering.cpu.build import Kernel, lower
from ramnet import allocator
from ramnet.ops import reference
from schedules.base import Schedule
from schedules.workload import Workload

Build = Callable[[Workload, str, Schedule], Kernel]


@dataclass
class CpuRunner:
    """Runs in the worker's process. ``open`` must be called first, and ``build`` before a schedule is used."""

    build_kernel: Build = lower
    kernels: dict[Schedule, Kernel] = field(default_factory=dict)

    def open(self, workload: Workload, target: str, threads: int) -> None:
        """Draw the inputs and compute the expected results."""
        torch.set_num_threads(threads)
        allocator.keep_freed_memory()
        self.target, self.kernels = target, {}
        self.timed, self.checked = Problem(workload), Problem(checked(workload))
        _ = self.timed.arguments, self.checked.expected

    def build(self, schedule: Schedule) -> None:
        """Compile the kernel or load it from the cache."""
        self.kernels[schedule] = self.build_kernel(self.timed.workload, self.target, schedule)

    def check(self, schedule: Schedule) -> None:
        """Raise WrongResultError if the results differ from the reference."""
        self.checked.check(OneKernel(self.kernels[schedule]))

    def measure(self, candidates: dict[str, Schedule | None], rounds: int, seconds: float) -> dict[str, Timing]:
        """Time the candidates by ``autotune.measure.timing.interleaved``; None is the reference."""
        calls: dict[str, Callable[[], Any]] = {}
        for name, schedule in candidates.items():
            backend: Any = reference if schedule is None else OneKernel(self.kernels[schedule])
            calls[name] = self.timed.call(backend)
        return interleaved(calls, rounds, seconds)
