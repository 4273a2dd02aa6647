"""What a kernel computes: an op with its sizes, its dtype and the constants compiled into it."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Literal, Self

from pydantic import BaseModel, ConfigDict

Op = Literal[
    "address_decode", "address_decode_backward", "memory_scan", "memory_scan_backward", "memory_step",
    "decode_heads",
]  # fmt: skip

# The sizes of each op by the paper's symbols. N is B·H, R the rows of logits.
AXES: dict[str, tuple[str, ...]] = {
    "address_decode": ("R", "U", "P", "K"),
    "address_decode_backward": ("R", "U", "P", "K"),
    "memory_scan": ("N", "T", "K", "M", "D"),
    "memory_scan_backward": ("N", "T", "K", "M", "D"),
    "memory_step": ("N", "K", "M", "D"),
    "decode_heads": ("N", "U", "P", "K", "M", "D"),
}
# Sizes that are dynamic in a kernel; the others are compiled in.
DYNAMIC_AXES = frozenset({"R", "N", "T"})


class Workload(BaseModel):
    """An op, its sizes, its dtype, and the constants (γ, ε, ε') compiled into its kernel."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    op: Op
    shape: dict[str, int]
    dtype: Literal["float32", "float64", "bfloat16", "float16"] = "float32"  # of values, weights and logits
    constants: dict[str, float] = {}

    @classmethod
    def of(cls, op: Op, sizes: Sequence[int], dtype: object, constants: dict[str, float]) -> Self:
        """Create a workload from sizes in the order of ``AXES``, and a torch dtype or its name."""
        shape = dict(zip(AXES[op], sizes, strict=True))
        return cls.model_validate(
            {"op": op, "shape": shape, "dtype": str(dtype).removeprefix("torch."), "constants": constants}
        )

    def model_post_init(self, _: object) -> None:
        if tuple(self.shape) != AXES[self.op]:
            raise ValueError(f"{self.op} has the axes {' '.join(AXES[self.op])}, not {' '.join(self.shape)}")
        for axis, size in self.shape.items():
            if size >= 2**31:
                raise ValueError(f"{self.op} has {axis} = {size}; kernels count in int32, to {2**31 - 1}")

    @property
    def name(self) -> str:
        """The workload as one line, for keys and tables."""
        sizes = " ".join(f"{axis}={size}" for axis, size in self.shape.items())
        constants = "".join(f" {name}={value:g}" for name, value in sorted(self.constants.items()))
        return f"{self.op} {sizes} {self.dtype}{constants}"

    @property
    def kernel_name(self) -> str:
        """``name`` without dynamic sizes and with exact constants."""
        sizes = " ".join(f"{axis}={size}" for axis, size in self.shape.items() if axis not in DYNAMIC_AXES)
        constants = "".join(f" {name}={value!r}" for name, value in sorted(self.constants.items()))
        return f"{self.op} {sizes} {self.dtype}{constants}"

    def distance(self, other: Workload) -> float:
        """Return the distance of two workloads: doublings of sizes, plus one for another dtype and one for another γ.

        It is infinite for different ops.
        """
        if self.op != other.op:
            return math.inf
        doublings = sum(abs(math.log2(max(size, 1) / max(other.shape[axis], 1))) for axis, size in self.shape.items())
        gamma = self.constants.get("decay_power") != other.constants.get("decay_power")
        return doublings + (self.dtype != other.dtype) + gamma


def heads_of(workload: Workload) -> int:
    """Return H for a workload of decode_heads, which has only N = B·H: 16, as in "340m", if it divides N, else N."""
    N = workload.shape["N"]
    return 16 if N % 16 == 0 else N
