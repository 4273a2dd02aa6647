"""A search without the hardware: each candidate is compiled for the target and ranked by the time model. Nothing runs.

The default is trial 0 and the yardstick, also where its own binary is not fit; a record is always one that is.
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

# The default, or what is known, stays unless the model sees more than this over it: its constants are rounded to a few
# percent.
LEAST_GAIN = 1.02


class AnalyticalSearch(Search):
    """Trials are compiled in a process that can be killed."""

    how = "modelled, not run"

    def prepare(self) -> None:
        self.worker.open(self.study.workload, self.target)
        self.predictions: dict[Schedule, Prediction] = {}
        self.yardstick = self._predict(self.default)

    def try_out(self, schedule: Schedule) -> None:
        """Compile and predict; FailedError also where the binaries are not fit."""
        found = self._predict(schedule)
        if found.status != "ok":
            raise FailedError(found.status, found.reason)

    def attempt(self, trial: optuna.Trial, schedule: Schedule) -> None:
        """The binaries' needs are kept also of what is refused for them."""
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
        """The best by the model, or what is standing, or the default, within what the model can tell."""
        self.report("choosing by the model")
        winner = self._winner()
        chosen = self._predict(winner)
        record = self.record(
            winner, device, gain=self.yardstick.seconds / chosen.seconds, gain_spread=0.0, tuned=_time(chosen),
            default=_time(self.yardstick), launches=chosen.launches,
        )  # fmt: skip
        return Result(record, None, self.study)

    def _winner(self) -> Schedule:
        """RuntimeError where nothing that was compiled is fit for the target."""
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
