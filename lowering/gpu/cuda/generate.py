"""Generates CUDA C from TIR templates."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from lowering.gpu.threads import ORDERED
from lowering.targets import Gpu
from schedules.gpu.shared import refuse_bytes

# The template places its own barriers: TVM would add one at every access whose index it cannot analyse. Its buffers
# have their final size. nvcc eliminates common subexpressions: TVM would turn some of them into kernel parameters.
_LEFT_OUT = ("s_tir.ThreadSync", "s_tir.CompactBufferAllocation", "tirx.CommonSubexprElim")


class SharedMemoryError(ValueError):
    """A program needs more shared memory than the target has."""

    status = "shared_memory"


@dataclass(frozen=True)
class Source:
    """The kernels of a workload as CUDA C.

    Attributes:
        arguments: by function, its tensors in the template's order: a name, and the shape with dynamic sizes by name.
        shared: by function, bytes of dynamic shared memory.
    """

    text: str
    arguments: dict[str, list[list[Any]]]
    shared: dict[str, int]

    def parameters(self, name: str) -> list[str]:
        """Return the kernel's parameters in order: a tensor's name with ``_ptr``, or the name of a dynamic size."""
        found = re.search(rf"\b{name}_kernel\(([^)]*)\)", self.text)
        if found is None:
            raise ValueError(f"the CUDA C has no kernel {name}_kernel")
        return [parameter.split()[-1] for parameter in found[1].split(",")]


def build(module: Any, target: Any, left_out: Sequence[str] = ()) -> Any:
    """Compile a template for CUDA or a CPU with TVM's default passes, except ``_LEFT_OUT`` and ``left_out``."""
    import tvm

    with tvm.transform.PassContext(disabled_pass=[*_LEFT_OUT, *left_out]):
        return tvm.compile(module, target=target)


def require_shared(op: str, module: Any, gpu: Gpu) -> None:
    """Raise SharedMemoryError, with the bytes and the limit, if a kernel needs more shared memory than ``gpu`` has."""
    refused = refuse_bytes(max(_shared(module).values()), gpu.shared_block)
    if refused is not None:
        raise SharedMemoryError(f"{op} on {gpu.arch}: {refused}")


def generate(module: Any) -> Source:
    """Return a template's kernels as CUDA C, which is the same for every architecture that nvcc compiles it for."""
    import tvm

    shared = _shared(module)
    kind = {"kind": "cuda", "arch": "sm_80", "max_shared_memory_per_block": max(shared.values())}
    text = build(module, tvm.target.Target(kind, host={"kind": "llvm"})).mod.imports[0].inspect_source()
    if any(ORDERED in function.attrs for function in module.functions.values()):
        text = text.replace(" __restrict__", "")
    arguments = {name.name_hint: _arguments(function) for name, function in module.functions.items()}
    return Source(text, arguments, shared)


def _shared(module: Any) -> dict[str, int]:
    """Return the bytes of dynamic shared memory of each function."""
    return {name.name_hint: int(function.attrs["shared_bytes"]) for name, function in module.functions.items()}


def _arguments(function: Any) -> list[list[Any]]:
    """Return a function's tensors in order."""
    return [
        [str(tensor.name), [int(d) if hasattr(d, "value") else str(d.name) for d in tensor.shape]]
        for tensor in function.params
    ]
