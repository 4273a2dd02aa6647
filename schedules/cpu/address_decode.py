"""Schedules of address_decode and its gradient on a CPU. Each vector lane handles one row of logits."""

from __future__ import annotations

from typing import ClassVar, Self

from schedules.base import KNOB_VALUES, Schedule
from schedules.cpu.lanes import refuse_lanes
from schedules.workload import Workload


class AddressDecode(Schedule):
    """Schedule of the top-K addresses."""

    lanes: int  # rows of logits in one vector
    unroll: int  # what is unrolled: 0 nothing, 1 the code of one sub-vector, 2 that of all U sub-vectors
    parallel: bool  # distribute rows over threads

    # The most compare-exchanges of a sub-vector to unroll; LLVM compiles 500 of them in 25 s.
    STRAIGHT_EXCHANGES: ClassVar[int] = 150
    # Fewer rows than this are a decoding step, which uses loops: they compile in 0.2 s instead of 1.5 s. In decoding
    # with "340m" a call took at least 115 µs either way, where a row in bulk takes 25 ns.
    COLD_ROWS: ClassVar[int] = 256

    @classmethod
    def exchanges(cls, workload: Workload) -> int:
        """Return the number of compare-exchanges of one sub-vector when unrolled."""
        P, K = workload.shape["P"], workload.shape["K"]
        width = 1 << (K - 1).bit_length()
        return P * min(P, K) + (min(P, K) - 1) * (width // 2) * (width.bit_length() - 1)

    @classmethod
    def default(cls, workload: Workload) -> Self:
        many = workload.shape["R"] >= cls.COLD_ROWS
        straight = many and cls.exchanges(workload) <= cls.STRAIGHT_EXCHANGES
        return cls(lanes=16, unroll=int(straight), parallel=many)

    @classmethod
    def space(cls, workload: Workload) -> dict[str, KNOB_VALUES]:
        straight = cls.default(workload).unroll == 1
        return {"lanes": (4, 8, 16, 32), "unroll": (0, 1, 2) if straight else (0,), "parallel": (False, True)}

    def refusal(self, workload: Workload) -> str | None:
        if self.unroll not in (0, 1, 2):
            return f"unroll is {self.unroll}; it must be 0, 1 or 2"
        if self.unroll and self.exchanges(workload) > self.STRAIGHT_EXCHANGES:
            return (
                f"{self.exchanges(workload)} exchanges a sub-vector are more than the {self.STRAIGHT_EXCHANGES}"
                " that straight code takes"
            )
        if self.unroll and workload.shape["R"] < self.COLD_ROWS:
            return f"straight code for {workload.shape['R']} rows, under {self.COLD_ROWS}, is built for nothing"
        return refuse_lanes(self.lanes, workload)


class AddressDecodeBackward(Schedule):
    """Schedule of the gradient of the logits."""

    lanes: int  # rows of logits in one vector
    parallel: bool  # distribute rows over threads

    @classmethod
    def default(cls, workload: Workload) -> Self:
        return cls(lanes=16, parallel=workload.shape["R"] >= AddressDecode.COLD_ROWS)

    @classmethod
    def space(cls, workload: Workload) -> dict[str, KNOB_VALUES]:
        return {"lanes": (4, 8, 16, 32), "parallel": (False, True)}

    def refusal(self, workload: Workload) -> str | None:
        return refuse_lanes(self.lanes, workload)
