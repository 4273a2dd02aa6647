"""The schedule of a whole layer on one token on a CPU."""

from __future__ import annotations

from typing import Self

from schedules.base import KNOB_VALUES, Schedule
from schedules.cpu.lanes import refuse_lanes
from schedules.workload import Workload


class DecodeLayer(Schedule):
    """Schedule of a whole layer on one token. Its matrix products, which take nearly all of the time, are parallel."""

    rows: int  # outputs of a matrix product computed in one loop; the largest divisor of the outputs up to this
    lanes: int  # partial sums per output; the largest divisor of the inputs up to this

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
