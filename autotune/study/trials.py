"""Validates the trials of a study in a journal, so that a search can continue from them."""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING, Any

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from autotune.study.space import Space
from autotune.study.worker import LONGEST_LIMIT
from ramnet.config import one_line

if TYPE_CHECKING:
    import optuna

# Trials with these statuses took no time and have no result of their own.
NOT_MEASURED = ("refused", "duplicate", "interrupted", "killed")


class _Owner(BaseModel):
    """The process that runs a trial."""

    model_config = ConfigDict(strict=True)

    host: str
    pid: int = Field(gt=0, lt=2**31)
    began: float | None = Field(allow_inf_nan=False)


class _Attributes(BaseModel):
    """The attributes of a trial, besides its knobs and value, that ``Study`` stores."""

    model_config = ConfigDict(strict=True)

    status: str = ""
    error: str = ""
    owner: _Owner | None = None
    seconds: float = Field(0.0, ge=0, le=LONGEST_LIMIT)


def refuse_damaged(study: optuna.Study, space: Space) -> None:
    """Raise ValueError, with the trial, if a study is damaged or is not a search of ``space``."""
    if [direction.name for direction in study.directions] != ["MAXIMIZE"]:
        raise ValueError(f"the study {study.study_name!r} does not maximise the gain")
    for trial in study.get_trials(deepcopy=False):
        why = _damage(trial, space)
        if why is not None:
            raise ValueError(f"trial {trial.number} of {study.study_name!r} is damaged: {why}")


def _damage(trial: optuna.trial.FrozenTrial, space: Space) -> str | None:
    try:
        found = _Attributes.model_validate(trial.user_attrs)
    except ValidationError as error:
        return one_line(error)
    known = space.parameters
    for name, distribution in trial.distributions.items():
        if getattr(distribution, "choices", None) != known.get(name):
            values = getattr(distribution, "choices", distribution)
            return f"{name} is not a knob of this search with the values {values}"
    planned = trial.system_attrs.get("fixed_params", {})
    if not isinstance(planned, dict) or any(value not in known.get(name, ()) for name, value in planned.items()):
        return f"the knobs {planned!r:.80} are not knobs of this search"
    if not trial.state.is_finished():
        return None
    if not found.status:
        return "it has ended without a status"
    values = trial.values
    if (trial.state.name == "COMPLETE" or values is not None) and not _is_gain(values):
        return f"its value is {values!r:.40}; it must be a number"
    if found.status not in NOT_MEASURED and space.schedule(trial.params) is None:
        return "some of its knobs are missing"
    return None


def _is_gain(values: Any) -> bool:
    return len(values or ()) == 1 and isinstance(values[0], (int, float)) and abs(values[0]) <= sys.float_info.max
