"""Knobs of the GPU kernels that decode one token."""

from __future__ import annotations

from typing import Literal, Self

from schedules.base import KNOB_VALUES, Schedule
from schedules.gpu.address import default_unroll, refuse_threads, refuse_unroll
from schedules.workload import Workload


class MemoryStep(Schedule):
    """One token, in place: a program owns a head."""

    compiler: Literal["triton", "tir"] = "triton"
    threads: int = 64

    @classmethod
    def default(cls, workload: Workload) -> Self:
        return cls()

    @classmethod
    def space(cls, workload: Workload) -> dict[str, KNOB_VALUES]:
        return {"compiler": ("triton", "tir"), "threads": (32, 64, 128, 256)}

    def refusal(self, workload: Workload) -> str | None:
        return refuse_threads(self.threads)


class DecodeHeads(Schedule):
    """A layer's token from its projections to its read-out in one launch: a program owns a head."""

    compiler: Literal["triton", "tir"] = "triton"
    threads: int = 64
    unroll: int = 1  # of finding the addresses: 0 nothing, 1 the work on one sub-vector, 2 that on all U of them

    @classmethod
    def default(cls, workload: Workload) -> Self:
        return cls(threads=max(64, _accesses(workload)), unroll=default_unroll(workload))

    @classmethod
    def space(cls, workload: Workload) -> dict[str, KNOB_VALUES]:
        return {"compiler": ("triton", "tir"), "threads": (32, 64, 128, 256), "unroll": (0, 1, 2)}

    def refusal(self, workload: Workload) -> str | None:
        needed = _accesses(workload)
        return (
            refuse_threads(self.threads)
            or refuse_unroll(self.unroll, workload)
            # Else a thread would hold the lists of two addresses.
            or (f"threads is {self.threads}; it must be at least {needed}" if self.threads < needed else None)
        )


def _accesses(workload: Workload) -> int:
    """Slots that a token reads and writes, each a power of two: a thread decodes each."""
    return 2 << (workload.shape["K"] - 1).bit_length()
