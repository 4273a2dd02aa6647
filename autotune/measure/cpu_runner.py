"""What a worker does for one workload: build a schedule's kernel, check its numbers, take its time."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, Protocol

import torch

from autotune.measure.freed_memory import keep_freed_memory
from autotune.measure.problems import TOLERANCE, OneKernel, Problem, checked
from autotune.measure.timing import Timing, interleaved
from lowering.cpu.build import Kernel, lower
from ramnet.ops import reference
from schedules.base import Schedule
from schedules.workload import Workload

Build = Callable[[Workload, str, Schedule], Kernel]


class WrongResultError(Exception):
    """A kernel computes other numbers than the reference."""

    status = "wrong_result"


def check(problem: Problem, backend: Any) -> None:
    """WrongResultError, with the error and what is allowed, where the numbers are not the reference's."""
    error, allowed = problem.error(backend), TOLERANCE[problem.workload.dtype]
    if not error <= allowed:
        raise WrongResultError(f"the relative RMSE is {error:.1e}; {allowed:.0e} is allowed")


class Measures(Protocol):
    """What the tuner needs. Failures of one candidate are ``autotune.study.worker.FailedError``; ``OutOfTimeError`` is
    for what was still going on at ``deadline``, by ``perf_counter``."""

    deadline: float | None

    def open(self, workload: Workload, target: str) -> None:
        """What follows is about ``workload``."""

    def try_out(self, schedule: Schedule) -> None:
        """Build and check."""

    def measure(
        self, candidates: Mapping[str, Schedule | None], rounds: int, seconds: float
    ) -> dict[str, Timing]:  # fmt: skip
        """Time in turn what was tried out; None is the reference in eager PyTorch."""


@dataclass
class Measurer:
    """Runs in the worker's process. ``build`` makes a kernel; ``open`` comes before all else."""

    build_kernel: Build = lower
    kernels: dict[Schedule, Kernel] = field(default_factory=dict)

    def open(self, workload: Workload, target: str, threads: int) -> None:
        """Draw the inputs and compute the right answer."""
        torch.set_num_threads(threads)
        keep_freed_memory()
        self.target, self.kernels = target, {}
        self.timed, self.checked = Problem(workload), Problem(checked(workload))
        _ = self.timed.arguments, self.checked.expected

    def build(self, schedule: Schedule) -> None:
        """Compile, or load from the cache."""
        self.kernels[schedule] = self.build_kernel(self.timed.workload, self.target, schedule)

    def check(self, schedule: Schedule) -> None:
        """WrongResultError where the numbers are not the reference's."""
        check(self.checked, OneKernel(self.kernels[schedule]))

    def measure(self, candidates: dict[str, Schedule | None], rounds: int, seconds: float) -> dict[str, Timing]:
        """``autotune.measure.timing.interleaved`` of the candidates' kernels; None is the reference."""
        calls: dict[str, Callable[[], Any]] = {}
        for name, schedule in candidates.items():
            backend: Any = reference if schedule is None else OneKernel(self.kernels[schedule])
            calls[name] = self.timed.call(backend)
        return interleaved(calls, rounds, seconds)
