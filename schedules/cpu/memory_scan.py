"""The knobs of the scans on a CPU."""

from __future__ import annotations

from typing import Self

from schedules.base import KNOB_VALUES, Schedule, divisors, largest_divisor, refuse_divisor, refuse_unroll, up_to
from schedules.workload import Workload


class MemoryScan(Schedule):
    """Forward scan: heads (and groups of channels) in parallel, each walking through time in chunks."""

    tile: int  # channels updated by one vector statement
    groups: int  # parts of D that may run on different threads; each repeats the mass
    chunk: int  # tokens whose decays and read factors are computed ahead, then used for every tile
    unroll: int  # slots of a token in straight code

    @classmethod
    def default(cls, workload: Workload) -> Self:
        dim = workload.shape["D"]
        return cls(tile=largest_divisor(dim, 32), groups=1, chunk=64, unroll=min(8, workload.shape["K"]))

    @classmethod
    def space(cls, workload: Workload) -> dict[str, KNOB_VALUES]:
        return {
            "tile": divisors(workload.shape["D"], 4, 128),
            "groups": (1, 2, 4),
            "chunk": (16, 64, 256, 1024),
            "unroll": up_to(workload.shape["K"], (1, 2, 4, 8, 16)),
        }

    def refusal(self, workload: Workload) -> str | None:
        width = workload.shape["D"] // max(self.groups, 1)
        return (
            refuse_divisor("groups", self.groups, "D", workload.shape["D"])
            or refuse_divisor("tile", self.tile, "D / groups", width)
            or refuse_unroll(self.unroll, workload.shape["K"])
            or (None if 1 <= self.chunk <= 65536 else f"chunk is {self.chunk}; it must be in 1..65536")
        )


class MemoryScanBackward(Schedule):
    """Backward scan: heads in parallel; for each tile of channels, forward with a history, then back."""

    tile: int  # channels whose state, gradient and history are worked on at a time
    unroll: int  # slots of a token in straight code

    @classmethod
    def default(cls, workload: Workload) -> Self:
        return cls(tile=largest_divisor(workload.shape["D"], 32), unroll=min(8, workload.shape["K"]))

    @classmethod
    def space(cls, workload: Workload) -> dict[str, KNOB_VALUES]:
        return {
            "tile": divisors(workload.shape["D"], 4, 128),
            "unroll": up_to(workload.shape["K"], (1, 2, 4, 8, 16)),
        }

    def refusal(self, workload: Workload) -> str | None:
        return refuse_divisor("tile", self.tile, "D", workload.shape["D"]) or refuse_unroll(
            self.unroll, workload.shape["K"]
        )
