"""The base class of schedules, and rules that several of them share."""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Mapping
from typing import Any, Self

from pydantic import BaseModel, ConfigDict

from schedules.workload import Workload

KNOB_VALUES = tuple[Any, ...]


class Schedule(BaseModel):
    """The knobs of one kernel; immutable. Subclasses define them."""

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True)

    @classmethod
    def default(cls, workload: Workload) -> Self:
        """Return the schedule of this form that is used if none was tuned.

        It may be refused; ``schedules.kinds.default_schedule`` is valid for every workload.
        """
        raise NotImplementedError

    @classmethod
    def space(cls, workload: Workload) -> dict[str, KNOB_VALUES]:
        """Return the values of each knob for tuning; not every combination is valid."""
        raise NotImplementedError

    def refusal(self, workload: Workload) -> str | None:
        """Return why this schedule is not valid for ``workload``, as a sentence, or None if it is valid."""
        raise NotImplementedError

    def __str__(self) -> str:
        """Return the knobs as "name=value"."""
        return " ".join(f"{name}={value}" for name, value in self.model_dump().items())

    def require(self, workload: Workload) -> None:
        """Raise ValueError, with the op and the reason, if this schedule is not valid for ``workload``."""
        refused = self.refusal(workload)
        if refused is not None:
            raise ValueError(f"{workload.op}: {refused}")


def combinations(kind: type[Schedule], space: Mapping[str, KNOB_VALUES]) -> Iterator[Schedule]:
    """Return the schedules with all combinations of the knobs' values, in the order of the space."""
    return (kind(**dict(zip(space, values, strict=True))) for values in itertools.product(*space.values()))


def largest_divisor(number: int, limit: int) -> int:
    """Return the largest divisor of ``number`` that is at most ``limit``."""
    return max(d for d in range(1, min(number, limit) + 1) if number % d == 0)


def divisors(number: int, low: int, high: int) -> tuple[int, ...]:
    """Return the divisors of ``number`` in low..high; if there are none, the largest one below."""
    found = tuple(d for d in range(low, min(number, high) + 1) if number % d == 0)
    return found or (largest_divisor(number, high),)


def up_to(limit: int, values: tuple[int, ...]) -> tuple[int, ...]:
    """Return the ``values`` that are at most ``limit``."""
    return tuple(v for v in values if v <= limit)


def refuse_divisor(name: str, value: int, of: str, number: int) -> str | None:
    """Return a sentence if ``value`` does not divide ``number``."""
    return None if value >= 1 and number % value == 0 else f"{name} is {value}, which does not divide {of} = {number}"


def refuse_unroll(unroll: int, top_k: int) -> str | None:
    """Return a sentence if ``unroll`` is not in 1..K."""
    return None if 1 <= unroll <= top_k else f"unroll is {unroll}; it must be in 1..K = {top_k}"
