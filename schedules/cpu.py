"""The knobs of each op's TIR kernel on a CPU: their values, their defaults and the rules that refuse some."""

from __future__ import annotations

from typing import ClassVar, Self

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


class MemoryStep(Schedule):
    """One token: heads in turn or in parallel."""

    tile: int  # channels updated by one vector statement
    unroll: int  # slots in straight code
    parallel: bool  # heads on all threads; waking them costs microseconds
    prefetch: int  # heads ahead whose rows are asked for; 0 for none

    @classmethod
    def default(cls, workload: Workload) -> Self:
        touched = workload.shape["N"] * workload.shape["K"] * workload.shape["D"]
        return cls(
            tile=largest_divisor(workload.shape["D"], 64),
            unroll=min(8, workload.shape["K"]),
            parallel=touched > 2**17,
            # At M = 4^10 a step takes 6.8 µs with it and 8.5 without, at M = 4^5 2.7 and 2.6.
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


class AddressDecode(Schedule):
    """Top-K addresses: each lane of a vector works on a row of its own."""

    lanes: int  # rows of logits in one vector
    unroll: int  # what is straight code: 0 nothing, 1 the work on one sub-vector, 2 that on all U of them
    parallel: bool  # rows on all threads

    # TVM keeps a buffer below this size on the stack, where LLVM finds registers for it.
    REGISTER_BYTES: ClassVar[int] = 1024
    # Compare-and-exchanges of one sub-vector in straight code; 500 of them take LLVM 25 s.
    STRAIGHT_EXCHANGES: ClassVar[int] = 150
    # Fewer rows than this are a step of decoding and take loops, which build in 0.2 s rather than 1.5 s. Within "340m"
    # a call took 115 µs or more either way, against 25 ns a row in bulk: the size of the code is not what costs there.
    COLD_ROWS: ClassVar[int] = 256

    @classmethod
    def exchanges(cls, workload: Workload) -> int:
        """Compare-and-exchanges that one sub-vector takes in straight code."""
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
        return refuse_lanes(self.lanes, workload, self.REGISTER_BYTES)


class AddressDecodeBackward(Schedule):
    """The gradient of the logits: each lane of a vector works on a row of its own."""

    lanes: int  # rows of logits in one vector
    parallel: bool  # rows on all threads

    @classmethod
    def default(cls, workload: Workload) -> Self:
        return cls(lanes=16, parallel=workload.shape["R"] >= AddressDecode.COLD_ROWS)

    @classmethod
    def space(cls, workload: Workload) -> dict[str, KNOB_VALUES]:
        return {"lanes": (4, 8, 16, 32), "parallel": (False, True)}

    def refusal(self, workload: Workload) -> str | None:
        return refuse_lanes(self.lanes, workload, AddressDecode.REGISTER_BYTES)


class Project(Schedule):
    """A linear layer on one token: blocks of output rows in parallel."""

    rows: int  # outputs worked on side by side
    lanes: int  # sums kept for each of them
    parallel: bool  # blocks of rows on all threads

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
        return refuse_divisor("lanes", self.lanes, "I", workload.shape["I"]) or refuse_lanes(
            self.lanes, workload, AddressDecode.REGISTER_BYTES
        )


class DecodeLayer(Schedule):
    """A whole layer on one token: its products, which are nearly all of the time, in parallel."""

    rows: int  # outputs of a product worked on side by side; fewer where it has fewer
    lanes: int  # sums kept for each of them; the largest divisor of the product's inputs up to it

    @classmethod
    def default(cls, workload: Workload) -> Self:
        return cls(rows=1, lanes=32)

    @classmethod
    def space(cls, workload: Workload) -> dict[str, KNOB_VALUES]:
        return {"rows": (1, 2, 4), "lanes": (8, 16, 32, 64, 128)}

    def refusal(self, workload: Workload) -> str | None:
        if self.rows < 1:
            return f"rows is {self.rows}; it must be at least 1"
        return refuse_lanes(self.lanes, workload, AddressDecode.REGISTER_BYTES)


SCHEDULES: dict[str, type[Schedule]] = {
    "address_decode": AddressDecode,
    "address_decode_backward": AddressDecodeBackward,
    "memory_scan": MemoryScan,
    "memory_scan_backward": MemoryScanBackward,
    "memory_step": MemoryStep,
    "project": Project,
    "decode_layer": DecodeLayer,
}


def refuse_lanes(lanes: int, workload: Workload, limit: int) -> str | None:
    """A sentence where a vector of ``lanes`` rows is no register."""
    size = lanes * (8 if workload.dtype == "float64" else 4)
    return None if lanes >= 1 and size < limit else f"{lanes} lanes are {size} bytes; they must be in 1..{limit - 1}"
