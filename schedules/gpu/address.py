"""Knobs of the GPU kernels that decode addresses: a thread works on a row of logits of its own."""

from __future__ import annotations

from typing import Literal, Self

from schedules.base import KNOB_VALUES, Schedule
from schedules.workload import Workload

THREADS = (64, 128, 256)
# The lists of a row live in its thread's registers, of which there are 255.
MOST_KEPT = 64
# 500 in one piece take Triton 3 s on an idle core, 1200 take 20.
STRAIGHT_EXCHANGES = 400


class AddressDecode(Schedule):
    """Top-K addresses."""

    compiler: Literal["triton", "tir"] = "triton"
    threads: int = 128  # rows a program
    unroll: int = 1  # what is straight code: 0 nothing, 1 the work on one sub-vector, 2 that on all U of them

    @classmethod
    def default(cls, workload: Workload) -> Self:
        return cls(unroll=default_unroll(workload))

    @classmethod
    def space(cls, workload: Workload) -> dict[str, KNOB_VALUES]:
        return {"compiler": ("triton", "tir"), "threads": THREADS, "unroll": (0, 1, 2)}

    def refusal(self, workload: Workload) -> str | None:
        return refuse_threads(self.threads) or refuse_unroll(self.unroll, workload)


def exchanges(sub_dim: int, top_k: int, unroll: int) -> tuple[int, int]:
    """Compare-and-exchanges that sort a sub-vector's digits, and that join a beam with them."""
    ranks = min(sub_dim, top_k)
    rounds = (top_k - 1).bit_length()
    bitonic = rounds << rounds >> 1
    if not unroll:
        return sub_dim * ranks, (ranks - 1) * bitonic
    # A list grows as it is filled. Of the digit of rank j K/(j + 1) prefixes survive; each starts where it may end.
    sorting = ranks * (ranks - 1) // 2 + (sub_dim - ranks) * ranks
    inserted = (sum(range(top_k % (j + 1) + 1, top_k + 1, j + 1)) for j in range(1, ranks))
    return sorting, sum(min(bitonic, each) for each in inserted)


def straight_exchanges(workload: Workload, unroll: int) -> int:
    """Compare-and-exchanges in straight code."""
    order, sub_dim, top_k = (workload.shape[axis] for axis in "UPK")
    sorting, joining = exchanges(sub_dim, top_k, unroll)
    if unroll == 2:
        return order * sorting + (order - 1) * joining
    # The first sub-vector, which meets no beam, has code of its own.
    return 2 * sorting + joining if unroll else 0


def default_unroll(workload: Workload) -> int:
    """1 where a compiler takes it in reasonable time, else 0."""
    return int(refuse_unroll(1, workload) is None)


def refuse_unroll(unroll: int, workload: Workload) -> str | None:
    """A sentence where straight code would be too long, or the lists do not fit in registers."""
    if unroll not in (0, 1, 2):
        return f"unroll is {unroll}; it must be 0, 1 or 2"
    count = straight_exchanges(workload, unroll)
    if count > STRAIGHT_EXCHANGES:
        return f"unroll {unroll} takes {count} exchanges in straight code; it must be at most {STRAIGHT_EXCHANGES}"
    return refuse_many(workload)


class AddressDecodeBackward(Schedule):
    """The gradient of the logits."""

    compiler: Literal["triton", "tir"] = "triton"
    threads: int = 128  # rows a program

    @classmethod
    def default(cls, workload: Workload) -> Self:
        return cls()

    @classmethod
    def space(cls, workload: Workload) -> dict[str, KNOB_VALUES]:
        return {"compiler": ("triton", "tir"), "threads": THREADS}

    def refusal(self, workload: Workload) -> str | None:
        return refuse_threads(self.threads) or refuse_many(workload)


def refuse_many(workload: Workload) -> str | None:
    """A sentence where a thread's registers do not hold a row's addresses."""
    kept = workload.shape["K"]
    return None if kept <= MOST_KEPT else f"K is {kept}; a thread's registers hold {MOST_KEPT} addresses"


def refuse_threads(threads: int) -> str | None:
    """A sentence where ``threads`` is no size of a program: a warp has 32 threads or, with AMD, 64."""
    good = 32 <= threads <= 1024 and threads & (threads - 1) == 0
    return None if good else f"threads is {threads}; it must be a power of two in 32..1024"
