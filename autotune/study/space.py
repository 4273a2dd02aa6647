"""The schedules that are searched for a workload, as the parameters of Optuna's trials."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING, Any

from schedules.base import KNOB_VALUES, Schedule, combinations
from schedules.kinds import kinds
from schedules.workload import Workload

if TYPE_CHECKING:
    import optuna

FORM = "form"


class Space:
    """The search space of a workload on a target.

    The parameters of a trial are the knobs of its schedule. If the op's kernel has several forms, the parameter "form"
    is drawn first, and then only the knobs of that form, which are named with a prefix, such as "slots.threads".
    """

    def __init__(self, workload: Workload, target: str) -> None:
        self._kinds = kinds(workload.op, target)
        self._values = {form: _values(kind, workload) for form, kind in self._kinds.items()}
        # Every parameter that a trial may have, with its values.
        self.parameters: dict[str, KNOB_VALUES] = {} if "" in self._kinds else {FORM: tuple(self._kinds)}
        for form, values in self._values.items():
            self.parameters |= {_name(form, knob): of for knob, of in values.items()}

    def schedules(self) -> Iterator[Schedule]:
        """Yield all combinations, including those that cannot be built."""
        for form, values in self._values.items():
            yield from combinations(self._kinds[form], values)

    def suggest(self, trial: optuna.Trial) -> Schedule:
        """Return the schedule that the trial's sampler draws."""
        form = "" if "" in self._kinds else trial.suggest_categorical(FORM, tuple(self._kinds))
        values = self._values[form].items()
        return self._kinds[form](**{knob: trial.suggest_categorical(_name(form, knob), of) for knob, of in values})

    def chosen(self, schedule: Schedule) -> dict[str, Any]:
        """Return the parameters of a trial with this schedule."""
        knobs = schedule.model_dump()
        form = knobs.pop(FORM, "")
        return ({FORM: form} if form else {}) | {_name(form, knob): value for knob, value in knobs.items()}

    def schedule(self, parameters: Mapping[str, Any]) -> Schedule | None:
        """Return the schedule of a trial; None if the trial ended before it had all its parameters."""
        form = parameters.get(FORM, "")
        names = {knob: _name(form, knob) for knob in self._values.get(form, ())}
        if form not in self._kinds or not parameters.keys() >= set(names.values()):
            return None
        return self._kinds[form](**{knob: parameters[name] for knob, name in names.items()})


def _name(form: str, knob: str) -> str:
    return f"{form}.{knob}" if form else knob


def _values(kind: type[Schedule], workload: Workload) -> dict[str, KNOB_VALUES]:
    """Return the values of each knob for tuning, and the default's, which may be another one."""
    default = kind.default(workload)
    return {knob: tuple(dict.fromkeys((*of, getattr(default, knob)))) for knob, of in kind.space(workload).items()}
