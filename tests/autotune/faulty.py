"""Fake work for a worker's process, which succeeds or fails in each possible way."""

from __future__ import annotations

import ctypes
import threading
from collections.abc import Callable
from typing import Any

from autotune.measure.timing import Timing
from autotune.study.worker import Worker
from schedules.base import Schedule
from schedules.workload import Workload

WORKLOAD = Workload(op="address_decode_backward", shape={"R": 512, "U": 2, "P": 4, "K": 4})
# How (lanes, parallel) of the 8 schedules ends.
STATUS = {
    (4, False): "crash", (4, True): "build_timeout", (8, False): "run_timeout", (8, True): "build_error",
    (16, False): "ok", (16, True): "ok", (32, False): "wrong_result", (32, True): "run_error",
}  # fmt: skip


class WrongError(Exception):
    """An error with a status, like ``CpuRunner``'s."""

    status = "wrong_result"


class Faulty:
    """A fake ``CpuRunner`` without heavy imports, so that its process starts quickly."""

    def open(self, workload: Workload, target: str, threads: int) -> None:
        pass

    def build(self, schedule: Any) -> None:
        match STATUS[schedule.lanes, schedule.parallel]:
            case "build_error":
                raise ValueError("no such vector")
            case "build_timeout":
                threading.Event().wait()

    def check(self, schedule: Any) -> None:
        match STATUS[schedule.lanes, schedule.parallel]:
            case "crash":
                ctypes.string_at(0)
            case "run_timeout":
                threading.Event().wait()
            case "run_error":
                raise RuntimeError("out of luck")
            case "wrong_result":
                raise WrongError("off by 1")

    def measure(self, candidates: Any, rounds: int, seconds: float) -> dict[str, Timing]:
        return {name: Timing((1e-3,) * rounds, rounds) for name in candidates}

    def predict(self, schedule: Any) -> None:
        threading.Event().wait()


def hangs(schedule: Any, phase: str) -> bool:
    """Return whether ``Faulty`` hangs in the phase "build", "run" or "compile"."""
    return phase == "compile" or STATUS[schedule.lanes, schedule.parallel] == f"{phase}_timeout"


class Impatient(Worker):
    """Waits half a second for a schedule that ``hangs`` in a phase, and without limit for all else."""

    def __init__(self, hangs: Callable[[Any, str], bool], **options: Any) -> None:
        super().__init__(1, **options)
        self.hangs = hangs

    def call(self, method: str, limit: float, phase: str, *arguments: Any) -> Any:
        hangs = isinstance(arguments[0], Schedule) and self.hangs(arguments[0], phase)
        return super().call(method, 0.5 if hangs else 600, phase, *arguments)


class Synthetic:
    """A fake worker in this process, whose times follow from ``gain``, a schedule's gain over the default."""

    longest_trial = 300.0

    def __init__(self, gain: Any) -> None:
        self.gain = gain
        self.tried: list[Schedule] = []

    def open(self, workload: Workload, target: str) -> None:
        self.workload = workload

    def try_out(self, schedule: Schedule) -> None:
        assert schedule.refusal(self.workload) is None
        self.tried.append(schedule)

    def measure(self, candidates: Any, rounds: int, seconds: float) -> Any:
        def samples(schedule: Schedule | None) -> tuple[float, ...]:
            gain = 0.1 if schedule is None else self.gain(schedule)
            # Rounds vary more than candidates, as on a busy machine.
            return tuple(1e-3 * (1 + i % 3) / gain for i in range(rounds))

        return {name: Timing(samples(schedule), rounds) for name, schedule in candidates.items()}
