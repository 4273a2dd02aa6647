"""A goal of the benchmark and its verdict."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

Verdict = Literal["met", "not met", "not decided", "not measured"]


@dataclass(frozen=True)
class Goal:
    """``measured`` should be at least (or at most) ``bound``; it is None if it was not measured in this run.

    ``spread`` is its interquartile range divided by the median.
    """

    name: str
    bound: float
    at_least: bool
    measured: float | None
    spread: float | None
    note: str = ""

    @property
    def verdict(self) -> Verdict:
        """ "not decided" if the spread is larger than the distance to the bound."""
        if self.measured is None:
            return "not measured"
        spread = (self.spread or 0.0) * self.measured
        if spread > abs(self.measured - self.bound) * (1 + 1e-9):
            return "not decided"
        return "met" if (self.measured >= self.bound) == self.at_least or self.measured == self.bound else "not met"
