"""Kernels without a compiler: right ones, and one of each way to fail."""

from __future__ import annotations

import ctypes
import threading
from typing import Any

from torch import Tensor

from lowering.kernels import Kernel
from ramnet.ops import reference
from schedules.base import Schedule
from schedules.cpu import AddressDecodeBackward
from schedules.workload import Workload

WORKLOAD = Workload(op="address_decode_backward", shape={"R": 512, "U": 2, "P": 4, "K": 4})
# How (lanes, parallel) of the 8 schedules ends.
STATUS = {
    (4, False): "crash", (4, True): "build_timeout", (8, False): "run_timeout", (8, True): "build_error",
    (16, False): "ok", (16, True): "ok", (32, False): "wrong_result", (32, True): "run_error",
}  # fmt: skip


def build(workload: Workload, target: str, schedule: Schedule) -> Kernel:
    """A build function for ``autotune.worker.Worker``."""
    assert isinstance(schedule, AddressDecodeBackward)
    status = STATUS[schedule.lanes, schedule.parallel]
    if status == "build_error":
        raise ValueError("no such vector")
    if status == "build_timeout":
        threading.Event().wait()

    def function(grad_weights: Tensor, logits: Tensor, slots: Tensor, weights: Tensor, grad: Tensor) -> None:
        if status == "crash":
            ctypes.string_at(0)
        if status == "run_timeout":
            threading.Event().wait()
        if status == "run_error":
            raise RuntimeError("out of luck")
        grad.copy_(reference.address_decode_backward(grad_weights, logits, slots, weights))
        if status == "wrong_result":
            grad[-1] += 1

    return Kernel(workload, schedule, function, True)


class Synthetic:
    """What measures in this process, by a rule: ``gain`` of a schedule over the default."""

    def __init__(self, gain: Any) -> None:
        self.gain = gain
        self.tried: list[Schedule] = []

    def open(self, workload: Workload, target: str) -> None:
        self.workload = workload

    def try_out(self, schedule: Schedule) -> None:
        self.tried.append(schedule)

    def measure(self, candidates: Any, rounds: int, seconds: float) -> Any:
        from autotune.measure import Timing

        def samples(schedule: Schedule | None) -> tuple[float, ...]:
            gain = 0.1 if schedule is None else self.gain(schedule)
            # Rounds differ by more than candidates do, as on a busy machine.
            return tuple(1e-3 * (1 + i % 3) / gain for i in range(rounds))

        return {name: Timing(samples(schedule), rounds) for name, schedule in candidates.items()}
