"""Launches of Triton's kernels."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from lowering.gpu.instructions import issued, of_amd, of_cubin
from lowering.gpu.plan import Launch
from lowering.gpu.resources import Compiled, Work
from lowering.gpu.triton_compiler import Binary, compile_source

if TYPE_CHECKING:
    from triton.compiler import ASTSource

    from lowering.targets import Gpu

_TYPES = {
    torch.float64: "*fp64", torch.float32: "*fp32", torch.bfloat16: "*bf16", torch.float16: "*fp16",
    torch.int64: "*i64", torch.int32: "*i32",
}  # fmt: skip
# The addresses of tensors passed to kernels are multiples of this many bytes.
ALIGNMENT = 16


@dataclass(frozen=True)
class TritonLaunch(Launch):
    """``kernel[grid](**arguments)`` on programs of ``threads`` threads.

    Arguments are tensors and numbers. Numbers that are not compile-time constants are int32 and marked
    ``do_not_specialize``, so that one binary serves all values.
    """

    kernel: Any  # a function decorated with triton.jit
    grid: tuple[int, ...]
    arguments: Mapping[str, Any]
    threads: int
    work: Work

    @property
    def name(self) -> str:
        return str(self.kernel.__name__)

    def run(self, gpu: Gpu) -> None:
        if all(self.grid):
            self.kernel[self.grid](**self.arguments, num_warps=self.threads // gpu.warp)

    def compile(self, gpu: Gpu) -> Compiled:
        made = self.binary(gpu)
        code = of_cubin(made.cubin)[self.name] if made.cubin else of_amd(made.asm["amdgcn"])
        return Compiled(self.name, self.work, made.resources, issued(code, self.work.nest))

    def binary(self, gpu: Gpu) -> Binary:
        """Compile the launch; its tensors may be meta tensors. Raises as ``source`` and ``compile_source`` do."""
        return compile_source(self.source(), self.threads, gpu)

    def source(self) -> ASTSource:
        """Return the input of Triton's compiler that ``run`` would give it.

        Raises RuntimeError if this process interprets kernels.
        """
        from triton.compiler import ASTSource

        if not hasattr(self.kernel, "cache_key"):
            raise RuntimeError(
                f"{self.name} is interpreted, and cannot be compiled, in a process where TRITON_INTERPRET was set"
            )
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
        return ASTSource(fn=self.kernel, signature=signature, constexprs=fixed, attrs=attributes)
