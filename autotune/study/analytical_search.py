"""A search without the hardware: candidates are compiled for the target and ranked by the time model.

The default is trial 0. Gains are relative to it even if its binary cannot be used; a recorded schedule's always can.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from autotune.model.prediction import Prediction
from autotune.study.search import Result, Search
from autotune.study.worker import FailedError
from schedules.base import Schedule
from schedules.records import Time

if TYPE_CHECKING:
    import optuna

# The default or the known schedule stays unless the modelled gain exceeds this, since the model's constants are rounded
# to a few percent.
LEAST_GAIN = 1.02


class AnalyticalSearch(Search):
    """Trials are compiled in a process that can be killed."""

    how = "modelled, not run"

    def prepare(self) -> None:
        self.worker.open(self.study.workload, self.target)
        self.predictions: dict[Schedule, Prediction] = {}
        self.yardstick = self._predict(self.default)

    def try_out(self, schedule: Schedule) -> None:
        """Compile and predict. Also raises FailedError if the binaries cannot be used."""
        found = self._predict(schedule)
        if found.status != "ok":
            raise FailedError(found.status, found.reason)

    def attempt(self, trial: optuna.Trial, schedule: Schedule) -> None:
        """Run the trial. The resources of the binaries are stored even if they cannot be used."""
        found = self._predict(schedule)
        trial.set_user_attr("how", self.how)
        trial.set_user_attr("launches", [launch.model_dump() for launch in found.launches])
        trial.set_user_attr("binds", found.binds)
        if found.status != "ok":
            raise FailedError(found.status, found.reason)
        self.study.succeed(
            trial, self.yardstick.seconds / found.seconds, seconds=found.seconds, default_seconds=self.yardstick.seconds
        )  # fmt: skip

    def finish(self, device: str) -> Result:
        """Choose the best by the model; the standing schedule or the default stays within the model's accuracy."""
        self.report("choosing by the model")
        winner = self._winner()
        chosen = self._predict(winner)
        record = self.record(
            winner, device, gain=self.yardstick.seconds / chosen.seconds, gain_spread=0.0, tuned=_time(chosen),
            default=_time(self.yardstick), launches=chosen.launches,
        )  # fmt: skip
        return Result(record, None, self.study)

    def _winner(self) -> Schedule:
        """Return the best schedule. Raises RuntimeError if no compiled schedule can be used on the target."""
        seconds = {schedule: self.study.seconds(schedule) for schedule in self.study.best(1)}
        if self.yardstick.status == "ok":
            seconds[self.default] = self.yardstick.seconds
        if self.standing is not None:
            seconds[self.standing] = self._predict(self.standing).seconds
        if not seconds:
            raise RuntimeError(
                f"{self.study.workload.name}: none of the schedules that were compiled is fit for {self.target};"
                f" of the default: {self.yardstick.reason}"
            )
        best = min(seconds, key=lambda schedule: seconds[schedule])
        stays = self.standing or self.default
        return stays if stays in seconds and seconds[stays] <= LEAST_GAIN * seconds[best] else best

    def _predict(self, schedule: Schedule) -> Prediction:
        if schedule not in self.predictions:
            self.predictions[schedule] = self.worker.predict(schedule)
        return self.predictions[schedule]


def _time(found: Prediction) -> Time:
    return Time(median=found.seconds, spread=0.0, runs=0)
