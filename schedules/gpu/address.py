"""Schedules of the GPU kernels that decode addresses. Each thread handles one row of logits."""

from __future__ import annotations

from typing import Literal, Self

from schedules.base import KNOB_VALUES, Schedule
from schedules.workload import Workload

THREADS = (64, 128, 256)
# The largest K whose lists fit in a thread's 255 registers.
MOST_KEPT = 64
# The most compare-exchanges to unroll; Triton compiles 500 in 3 s and 1200 in 20 s on an idle core.
STRAIGHT_EXCHANGES = 400


class AddressDecode(Schedule):
    """Schedule of the top-K addresses."""

    compiler: Literal["triton", "tir"] = "triton"
    threads: int = 128  # threads, and rows, of a program
    unroll: int = 1  # what is unrolled: 0 nothing, 1 the code of one sub-vector, 2 that of all U sub-vectors

    @classmethod
    def default(cls, workload: Workload) -> Self:
        return cls(unroll=default_unroll(workload))

    @classmethod
    def space(cls, workload: Workload) -> dict[str, KNOB_VALUES]:
        return {"compiler": ("triton", "tir"), "threads": THREADS, "unroll": unrolls(workload)}

    def refusal(self, workload: Workload) -> str | None:
        return refuse_threads(self.threads) or refuse_unroll(self.unroll, workload)


def exchanges(sub_dim: int, top_k: int, unroll: int) -> tuple[int, int]:
    """Return the number of compare-exchanges that sort a sub-vector's digits, and that merge them into the beam."""
    ranks = min(sub_dim, top_k)
    rounds = (top_k - 1).bit_length()
    bitonic = rounds << rounds >> 1
    if not unroll:
        return sub_dim * ranks, (ranks - 1) * bitonic
    # Lists grow while they are filled. At most K/(j + 1) extensions by the digit of rank j can be among the best K, and
    # each is inserted starting from the last position that it can reach.
    sorting = ranks * (ranks - 1) // 2 + (sub_dim - ranks) * ranks
    inserted = (sum(range(top_k % (j + 1) + 1, top_k + 1, j + 1)) for j in range(1, ranks))
    return sorting, sum(min(bitonic, each) for each in inserted)


def straight_exchanges(workload: Workload, unroll: int) -> int:
    """Return the number of unrolled compare-exchanges."""
    order, sub_dim, top_k = (workload.shape[axis] for axis in "UPK")
    sorting, joining = exchanges(sub_dim, top_k, unroll)
    if unroll == 2:
        return order * sorting + (order - 1) * joining
    # The first sub-vector has no beam to merge with, and so has separate code.
    return 2 * sorting + joining if unroll else 0


def default_unroll(workload: Workload) -> int:
    """Return 1 if that is valid for the workload, else 0."""
    return int(refuse_unroll(1, workload) is None)


def unrolls(workload: Workload) -> tuple[int, ...]:
    """Return what a tuner tries. On an H100, loops take 1.2 to 1.4 times as long as straight code."""
    return (1, 2) if default_unroll(workload) else (0,)


def refuse_unroll(unroll: int, workload: Workload) -> str | None:
    """Return a sentence if the unrolled code would be too long, or the lists do not fit in registers."""
    if unroll not in (0, 1, 2):
        return f"unroll is {unroll}; it must be 0, 1 or 2"
    count = straight_exchanges(workload, unroll)
    if count > STRAIGHT_EXCHANGES:
        return f"unroll {unroll} unrolls {count} compare-exchanges; at most {STRAIGHT_EXCHANGES} are allowed"
    return refuse_many(workload)


class AddressDecodeBackward(Schedule):
    """Schedule of the gradient of the logits."""

    compiler: Literal["triton", "tir"] = "triton"
    threads: int = 128  # threads, and rows, of a program

    @classmethod
    def default(cls, workload: Workload) -> Self:
        return cls()

    @classmethod
    def space(cls, workload: Workload) -> dict[str, KNOB_VALUES]:
        return {"compiler": ("triton", "tir"), "threads": THREADS}

    def refusal(self, workload: Workload) -> str | None:
        return refuse_threads(self.threads) or refuse_many(workload)


def refuse_many(workload: Workload) -> str | None:
    """Return a sentence if a row's K addresses do not fit in a thread's registers."""
    kept = workload.shape["K"]
    return None if kept <= MOST_KEPT else f"K is {kept}; a thread's registers hold at most {MOST_KEPT} addresses"


def refuse_threads(threads: int) -> str | None:
    """Return a sentence if ``threads`` is not a valid program size. A warp has 32 threads, or 64 on AMD."""
    good = 32 <= threads <= 1024 and threads & (threads - 1) == 0
    return None if good else f"threads is {threads}; it must be a power of two in 32..1024"
