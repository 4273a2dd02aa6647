"""A tuning run for a GPU that is not available, with simulated times."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from autotune.model.prediction import Prediction
from autotune.study.search import Budget, Result
from autotune.study.tuner import tune
from schedules.base import Schedule
from schedules.gpu import MemoryStep
from schedules.records import Launch
from schedules.workload import Workload

NOT_RUN = "modelled, not run"
WORKLOAD = Workload(
    op="memory_step", shape={"N": 64, "K": 4, "M": 64, "D": 32}, dtype="bfloat16",
    constants={"decay_power": 1.0, "eps": 1e-6},
)  # fmt: skip
DEFAULT = MemoryStep.default(WORKLOAD)
NEEDS = Launch(name="kernel", registers=40, spilled=0, local=0, shared=0)


class Synthetic:
    """A fake worker that simulates a schedule's time or failure."""

    longest_trial = 300.0

    def __init__(self, rule: Any) -> None:
        self.rule = rule
        self.tried: list[Schedule] = []

    def open(self, workload: Workload, target: str) -> None:
        self.workload = workload

    def predict(self, schedule: Schedule) -> Prediction:
        assert schedule.refusal(self.workload) is None
        self.tried.append(schedule)
        found = self.rule(schedule)
        if isinstance(found, Exception):
            raise found
        return found if isinstance(found, Prediction) else Prediction(found, (NEEDS,), (("chain", found),))


def run(
    folder: Path, worker: Any, trials: int | None = None, target: str = "a100", workload: Workload = WORKLOAD,
    **options: Any,
) -> list[Result]:  # fmt: skip
    return tune(
        target, [workload], worker, journal=folder / "journal.log", records_file=folder / "records.jsonl",
        budget=Budget(seconds=None, trials=trials), threads=1, modelled=True, **options,
    )  # fmt: skip


def others() -> list[Schedule]:
    from autotune.study.study import every_schedule

    return [schedule for schedule in every_schedule(WORKLOAD, "a100") if schedule != DEFAULT]
