"""Launches as values: run where there is a GPU, compiled for one where there is none."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from lowering.gpu.resources import Work

_TYPES = {
    torch.float64: "*fp64", torch.float32: "*fp32", torch.bfloat16: "*bf16", torch.float16: "*fp16",
    torch.int64: "*i64", torch.int32: "*i32",
}  # fmt: skip
# Tensors that are passed to kernels start at multiples of this many bytes.
ALIGNMENT = 16


@dataclass(frozen=True)
class Program:
    """A launch of a TIR template's function of that name.

    ``grid``: along each axis a number of blocks, or a run-time size by name and how much of it a block takes.
    """

    name: str
    grid: Sequence[int | tuple[str, int]]
    threads: int
    work: Work


@dataclass(frozen=True)
class Launch:
    """``kernel[grid](**arguments)`` on programs of ``threads`` threads.

    Arguments are contiguous tensors (on the meta device where the launch is only compiled), and numbers. A kernel's
    run-time numbers are int32 and marked ``do_not_specialize``, so that one binary serves all of them.
    """

    kernel: Any  # a function that triton.jit decorated
    grid: tuple[int, ...]
    arguments: Mapping[str, Any]
    threads: int
    work: Work

    @property
    def name(self) -> str:
        return str(self.kernel.__name__)

    def run(self, warp: int = 32) -> None:
        """Queue it on the current stream of the current device; ``warp`` is the device's threads a warp."""
        if all(self.grid):
            self.kernel[self.grid](**self.arguments, num_warps=self.threads // warp)

    def source(self) -> tuple[Any, int]:
        """What Triton's compiler takes, as ``run`` would have it."""
        from triton.compiler import ASTSource

        constants = {p.name for p in self.kernel.params if p.is_constexpr}
        signature, attributes = {}, {}
        for i, name in enumerate(self.kernel.arg_names):
            value = self.arguments[name]
            if name in constants:
                signature[name] = "constexpr"
            elif isinstance(value, Tensor):
                signature[name] = _TYPES[value.dtype]
                attributes[(i,)] = [["tt.divisibility", ALIGNMENT]]
            else:
                signature[name] = "i32" if isinstance(value, int) else "fp32"
        fixed = {name: self.arguments[name] for name in constants}
        return ASTSource(fn=self.kernel, signature=signature, constexprs=fixed, attrs=attributes), self.threads


@dataclass(frozen=True)
class Plan:
    """The launches of an op, in order, and the tensors that hold its results once they ran."""

    launches: tuple[Launch, ...]
    outputs: tuple[Tensor, ...]

    def run(self, warp: int = 32) -> tuple[Tensor, ...]:
        """Queue the launches on the outputs' device; the outputs."""
        with torch.cuda.device_of(self.outputs[0]):
            for launch in self.launches:
                launch.run(warp)
        return self.outputs
