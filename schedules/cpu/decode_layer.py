"""The knobs of a whole layer on one token on a CPU."""

from __future__ import annotations

from typing import Self

from schedules.base import KNOB_VALUES, Schedule
from schedules.cpu.lanes import refuse_lanes
from schedules.workload import Workload


class DecodeLayer(Schedule):
    """A whole layer on one token: its products, which are nearly all of the time, in parallel."""

    rows: int  # outputs of a product worked on side by side; fewer where it has fewer
    lanes: int  # sums kept for each of them; the largest divisor of the product's inputs up to it

    @classmethod
    def default(cls, workload: Workload) -> Self:
        return cls(rows=1, lanes=32)

    @classmethod
    def space(cls, workload: Workload) -> dict[str, KNOB_VALUES]:
        return {"rows": (1, 2, 4), "lanes": (8, 16, 32, 64, 128)}

    def refusal(self, workload: Workload) -> str | None:
        if self.rows < 1:
            return f"rows is {self.rows}; it must be at least 1"
        return refuse_lanes(self.lanes, workload)
