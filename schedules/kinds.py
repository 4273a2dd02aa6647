"""Which kinds of schedule an op has on a target: one, or one for each form of its kernel."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from schedules import cpu, gpu
from schedules.base import Schedule
from schedules.workload import Workload


def kinds(op: str, target: str) -> Mapping[str, type[Schedule]]:
    """The kinds by form, that of an op without forms by ""; those of the target's own kernels, of a CPU or of a GPU.

    ValueError, listing what there is, for an op that has no kernel for ``target``.
    """
    ops = cpu.SCHEDULES if target == "cpu" else gpu.SCHEDULES
    if op not in ops:
        raise ValueError(f"{op} has no kernel for {target}; there are {', '.join(sorted(ops))}")
    return {"": cpu.SCHEDULES[op]} if target == "cpu" else gpu.SCHEDULES[op]


def default_schedule(workload: Workload, target: str) -> Schedule:
    """What is used when nothing was tuned: the default of the first form that takes the workload, else of the first."""
    defaults = [kind.default(workload) for kind in kinds(workload.op, target).values()]
    return next((schedule for schedule in defaults if schedule.refusal(workload) is None), defaults[0])


def schedule_of(op: str, target: str, knobs: Mapping[str, Any]) -> Schedule:
    """The schedule with these knobs, "form" among them where the op has several; knobs of other forms are left out.

    ValueError for an op that has no kernel for ``target``, for an unknown form, and for a knob that no form has.
    """
    forms = kinds(op, target)
    if "" in forms:
        return forms[""](**knobs)
    form = knobs.get("form")
    if not isinstance(form, str) or form not in forms:
        raise ValueError(f"form is {form!r}; it must be one of {', '.join(forms)}")
    # Older records hold the knobs of all forms.
    others = {name for kind in forms.values() for name in kind.model_fields} - forms[form].model_fields.keys()
    return forms[form](**{name: value for name, value in knobs.items() if name not in others})
