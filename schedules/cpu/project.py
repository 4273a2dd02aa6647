"""The schedule of a linear layer on one token on a CPU."""

from __future__ import annotations

from typing import Self

from schedules.base import KNOB_VALUES, Schedule, divisors, largest_divisor, refuse_divisor, up_to
from schedules.cpu.lanes import refuse_lanes
from schedules.workload import Workload


class Project(Schedule):
    """Schedule of a linear layer on one token: blocks of outputs are parallel."""

    rows: int  # outputs computed in one loop
    lanes: int  # partial sums per output
    parallel: bool  # distribute blocks of outputs over threads

    @classmethod
    def default(cls, workload: Workload) -> Self:
        outputs, inputs = workload.shape["O"], workload.shape["I"]
        return cls(rows=1, lanes=largest_divisor(inputs, 32), parallel=outputs * inputs > 2**16)

    @classmethod
    def space(cls, workload: Workload) -> dict[str, KNOB_VALUES]:
        return {
            "rows": up_to(workload.shape["O"], (1, 2, 4, 8)),
            "lanes": divisors(workload.shape["I"], 8, 128),
            "parallel": (False, True),
        }

    def refusal(self, workload: Workload) -> str | None:
        if not 1 <= self.rows <= workload.shape["O"]:
            return f"rows is {self.rows}; it must be in 1..O = {workload.shape['O']}"
        return refuse_divisor("lanes", self.lanes, "I", workload.shape["I"]) or refuse_lanes(self.lanes, workload)
