"""A worker's runner for a GPU: builds a schedule's kernels, checks their results and times them."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor

from autotune.measure import eager_scan
from autotune.measure.cuda_clock import CudaClock, captured
from autotune.measure.eager_decode_heads import EAGER
from autotune.measure.problems import Problem, checked
from autotune.measure.timing import Clock, Timing, interleaved
from lowering.gpu.backend import GpuKernels
from ramnet.ops.accesses import Accesses
from schedules.base import Schedule
from schedules.workload import Workload

Call = Callable[[], object]


class GpuRunner:
    """The methods of ``autotune.measure.cpu_runner.CpuRunner``, for the GPU of this machine.

    Args:
        device: the device of the kernels.
        clock: times the kernels; None uses a ``CudaClock``.
        capture: captures a call as a CUDA graph, so that only the device's time is compared.
    """

    def __init__(
        self, device: str = "cuda", clock: Clock | None = None, capture: Callable[[Call], Call] = captured
    ) -> None:  # fmt: skip
        self.device, self.clock, self.capture = device, clock, capture
        self.kernels: dict[Schedule, GpuKernels] = {}

    def open(self, workload: Workload, target: str, threads: int) -> None:
        """Draw the inputs and compute the expected results; ``threads``, those of the host, do not affect the times."""
        torch.set_num_threads(threads)
        self.target, self.kernels = target, {}
        self.clock = self.clock or CudaClock()
        self.timed = Problem(workload, device=self.device)
        self.checked = Problem(checked(workload), device=self.device)
        _ = self.timed.arguments, self.checked.expected

    def build(self, schedule: Schedule) -> None:
        """Compile by a first call at the sizes of the check. Raises ValueError if the schedule is not valid."""
        workload = self.timed.workload
        schedule.require(workload)
        if schedule not in self.kernels:
            kernels = GpuKernels(self.target, given={workload.op: schedule})
            self.checked.call(kernels)()
            self._wait()
            self.kernels[schedule] = kernels

    def check(self, schedule: Schedule) -> None:
        """Raise WrongResultError if the results differ from the reference."""
        self.checked.check(self.kernels[schedule])

    def measure(self, candidates: dict[str, Schedule | None], rounds: int, seconds: float) -> dict[str, Timing]:
        """Time the candidates as CUDA graphs by ``autotune.measure.timing.interleaved``; None is eager PyTorch."""
        calls: dict[str, Call] = {}
        for name, schedule in candidates.items():
            if schedule is None:
                # Not captured, as it may synchronise with the device.
                calls[name] = self.timed.call(Eager())
            else:
                calls[name] = self.capture(self.timed.call(self.kernels[schedule]))
        return interleaved(calls, rounds, seconds, clock=self.clock)

    def _wait(self) -> None:
        if self.device == "cuda":
            torch.cuda.synchronize()


class Eager:
    """A backend of the fastest eager forms: the reference, except for the chunked scan."""

    def __getattr__(self, op: str) -> Any:
        return getattr(EAGER, op)

    def memory_scan(
        self, accesses: Accesses[Tensor], values: Tensor, memory: Tensor, mass: Tensor,
        decay_power: float, eps: float, proxy_eps: float,
    ) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
        scan = partial(eager_scan.scan_chunked, decay_power=decay_power, eps=eps)
        output, memory, mass = scan(*eager_scan.as_state((*accesses, values, memory, mass)))
        return output.to(values.dtype), memory, mass
