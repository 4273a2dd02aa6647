"""A speed to reach, and whether it was reached."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

Verdict = Literal["met", "not met", "not decided", "not measured"]


@dataclass(frozen=True)
class Goal:
    """``measured`` is to be at least ``bound`` (or at most); None where it was not measured in this run.

    ``spread`` is its interquartile range over the median.
    """

    name: str
    bound: float
    at_least: bool
    measured: float | None
    spread: float | None
    note: str = ""

    @property
    def verdict(self) -> Verdict:
        """Not decided where the spread is wider than the way to the bound."""
        if self.measured is None:
            return "not measured"
        spread = (self.spread or 0.0) * self.measured
        if spread > abs(self.measured - self.bound) * (1 + 1e-9):
            return "not decided"
        return "met" if (self.measured >= self.bound) == self.at_least or self.measured == self.bound else "not met"
