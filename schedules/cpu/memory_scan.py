"""The schedules of the scans on a CPU."""

from __future__ import annotations

from typing import Self

from schedules.base import KNOB_VALUES, Schedule, divisors, largest_divisor, refuse_divisor, refuse_unroll, up_to
from schedules.workload import Workload


class MemoryScan(Schedule):
    """Schedule of the forward scan: heads and groups of channels are parallel, tokens are scanned in chunks."""

    tile: int  # channels updated by one vector statement
    groups: int  # parts of D that can run on different threads; each computes the mass again
    chunk: int  # tokens whose decays and read factors are computed together, then used for every tile
    unroll: int  # slots of a token that are unrolled

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
    """Schedule of the backward scan: heads are parallel; a tile of channels runs forward with a history, then back."""

    tile: int  # channels whose state, gradient and history are in use at a time
    unroll: int  # slots of a token that are unrolled

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
