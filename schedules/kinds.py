"""The classes of schedules of each op and target: one, or one for each form of the kernel."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from schedules import cpu, gpu
from schedules.base import Schedule
from schedules.workload import Workload

# The forms that an op had in earlier versions, whose records are not read, with their knobs.
FORMER_FORMS = {"memory_scan_backward": {"serial": ("tile", "threads", "spans", "checkpoint")}}


def kinds(op: str, target: str) -> Mapping[str, type[Schedule]]:
    """Return the schedule classes of ``op`` on ``target`` by form; an op without forms has one, under "".

    Raises ValueError, listing the ops, if ``op`` has no kernel for ``target``.
    """
    ops = cpu.SCHEDULES if target == "cpu" else gpu.SCHEDULES
    if op not in ops:
        raise ValueError(f"{op} has no kernel for {target}; there are {', '.join(sorted(ops))}")
    return {"": cpu.SCHEDULES[op]} if target == "cpu" else gpu.SCHEDULES[op]


def default_schedule(workload: Workload, target: str) -> Schedule:
    """Return the schedule that is used if none was tuned: the default of the first form that accepts the workload.

    If none does, it is that of the first form, whose ``refusal`` says why.
    """
    defaults = [kind.default(workload) for kind in kinds(workload.op, target).values()]
    return next((schedule for schedule in defaults if schedule.refusal(workload) is None), defaults[0])


def schedule_of(op: str, target: str, knobs: Mapping[str, Any]) -> Schedule:
    """Return the schedule with these knobs, which include "form" if the op has several; other forms' knobs are ignored.

    Raises ValueError if ``op`` has no kernel for ``target``, the form is unknown, or no form has a knob.
    """
    forms = kinds(op, target)
    if "" in forms:
        return forms[""](**knobs)
    form = knobs.get("form")
    if not isinstance(form, str) or form not in forms:
        raise ValueError(f"form is {form!r}; it must be one of {', '.join(forms)}")
    # Older records hold the knobs of all forms.
    of_forms = [*(kind.model_fields for kind in forms.values()), *FORMER_FORMS.get(op, {}).values()]
    others = {name for knobs_of in of_forms for name in knobs_of} - forms[form].model_fields.keys()
    return forms[form](**{name: value for name, value in knobs.items() if name not in others})
