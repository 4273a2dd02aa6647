"""The schedule of one token's write and read on a CPU."""

from __future__ import annotations

from typing import Self

from schedules.base import KNOB_VALUES, Schedule, divisors, largest_divisor, refuse_divisor, refuse_unroll, up_to
from schedules.workload import Workload


class MemoryStep(Schedule):
    """Schedule of one token: heads run in turn or in parallel."""

    tile: int  # channels updated by one vector statement
    unroll: int  # slots that are unrolled
    parallel: bool  # distribute heads over threads; waking them takes microseconds
    prefetch: int  # how many heads ahead rows are prefetched; 0 for no prefetch

    @classmethod
    def default(cls, workload: Workload) -> Self:
        touched = workload.shape["N"] * workload.shape["K"] * workload.shape["D"]
        return cls(
            tile=largest_divisor(workload.shape["D"], 64),
            unroll=min(8, workload.shape["K"]),
            parallel=touched > 2**17,
            # A step takes 6.8 µs with prefetch and 8.5 µs without at M = 4^10, but 2.7 µs and 2.6 µs at M = 4^5.
            prefetch=int(workload.shape["M"] * workload.shape["D"] >= 2**20),
        )

    @classmethod
    def space(cls, workload: Workload) -> dict[str, KNOB_VALUES]:
        return {
            "tile": divisors(workload.shape["D"], 4, 128),
            "unroll": up_to(workload.shape["K"], (1, 2, 4, 8, 16)),
            "parallel": (False, True),
            "prefetch": (0, 1, 2),
        }

    def refusal(self, workload: Workload) -> str | None:
        return refuse_divisor("tile", self.tile, "D", workload.shape["D"]) or refuse_unroll(
            self.unroll, workload.shape["K"]
        )
