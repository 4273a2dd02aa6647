"""What a schedule is, and the rules that several of them share."""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Mapping
from typing import Any, Self

from pydantic import BaseModel, ConfigDict

from schedules.workload import Workload

KNOB_VALUES = tuple[Any, ...]


class Schedule(BaseModel):
    """Knobs of one kernel; immutable. Sub-classes say which, and what they mean."""

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True)

    @classmethod
    def default(cls, workload: Workload) -> Self:
        """What is used when nothing was tuned. The op's default, which takes every workload, is that of
        ``schedules.kinds.default_schedule``."""
        raise NotImplementedError

    @classmethod
    def space(cls, workload: Workload) -> dict[str, KNOB_VALUES]:
        """The values of each knob worth trying; not every combination is valid."""
        raise NotImplementedError

    def refusal(self, workload: Workload) -> str | None:
        """Why this combination cannot be built for ``workload``, in one sentence; None where it can."""
        raise NotImplementedError

    def __str__(self) -> str:
        """The knobs, as "name=value"."""
        return " ".join(f"{name}={value}" for name, value in self.model_dump().items())

    def require(self, workload: Workload) -> None:
        """ValueError, with the op and why, where this combination cannot be built for ``workload``."""
        refused = self.refusal(workload)
        if refused is not None:
            raise ValueError(f"{workload.op}: {refused}")


def combinations(kind: type[Schedule], space: Mapping[str, KNOB_VALUES]) -> Iterator[Schedule]:
    """The schedules with every choice of the knobs' values, in the order of the space."""
    return (kind(**dict(zip(space, values, strict=True))) for values in itertools.product(*space.values()))


def largest_divisor(number: int, limit: int) -> int:
    """The largest divisor of ``number`` that is at most ``limit``."""
    return max(d for d in range(1, min(number, limit) + 1) if number % d == 0)


def divisors(number: int, low: int, high: int) -> tuple[int, ...]:
    """The divisors of ``number`` in low..high, or the largest one below where there is none."""
    found = tuple(d for d in range(low, min(number, high) + 1) if number % d == 0)
    return found or (largest_divisor(number, high),)


def up_to(limit: int, values: tuple[int, ...]) -> tuple[int, ...]:
    """Those of ``values`` that are at most ``limit``."""
    return tuple(v for v in values if v <= limit)


def refuse_divisor(name: str, value: int, of: str, number: int) -> str | None:
    """A sentence where ``value`` does not divide ``number``."""
    return None if value >= 1 and number % value == 0 else f"{name} is {value}, which does not divide {of} = {number}"


def refuse_unroll(unroll: int, top_k: int) -> str | None:
    """A sentence where more slots are unrolled than there are."""
    return None if 1 <= unroll <= top_k else f"unroll is {unroll}; it must be in 1..K = {top_k}"
