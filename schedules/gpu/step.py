"""Schedules of the GPU kernels that decode one token."""

from __future__ import annotations

from typing import Literal, Self

from schedules.base import KNOB_VALUES, Schedule
from schedules.gpu.address import default_unroll, refuse_threads, refuse_unroll, unrolls
from schedules.workload import Workload


class MemoryStep(Schedule):
    """Schedule of one token in place: one program per head."""

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
    """Schedule of a layer's token between its two projections in one launch: one program per head."""

    compiler: Literal["triton", "tir"] = "triton"
    threads: int = 64
    unroll: int = 1  # what is unrolled in decoding addresses: 0 nothing, 1 the code of one sub-vector, 2 that of all U

    @classmethod
    def default(cls, workload: Workload) -> Self:
        return cls(threads=max(64, _accesses(workload)), unroll=default_unroll(workload))

    @classmethod
    def space(cls, workload: Workload) -> dict[str, KNOB_VALUES]:
        return {"compiler": ("triton", "tir"), "threads": (32, 64, 128, 256), "unroll": unrolls(workload)}

    def refusal(self, workload: Workload) -> str | None:
        needed = _accesses(workload)
        return (
            refuse_threads(self.threads)
            or refuse_unroll(self.unroll, workload)
            # With fewer, a thread would have to hold the lists of two addresses.
            or (f"threads is {self.threads}; it must be at least {needed}" if self.threads < needed else None)
        )


def _accesses(workload: Workload) -> int:
    """Return the number of a token's reads and writes, each padded to a power of two; a thread decodes each of them."""
    return 2 << (workload.shape["K"] - 1).bit_length()
