"""Traces the memory ops of a user's program: their workloads and numbers of calls."""

from __future__ import annotations

import os
import runpy
import sys
from collections import Counter
from pathlib import Path
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode

from lowering.targets import find
from ramnet.ops import reference
from ramnet.ops.packed import alike
from schedules.workload import Op, Workload


def trace(script: Path, target: str) -> tuple[list[Workload], dict[str, int]]:
    """Run ``script`` as ``python script`` does, and record its calls of the memory ops.

    Calls in this thread are recorded, on any backend. torch.compile is disabled meanwhile, so that it hides none.
    Tokens that a compiled model reads through its library are not recorded, as they call no op.

    Returns:
        The workloads for kernels of ``target`` in the order of their first calls, and the number of calls by name.

    Raises:
        ValueError: if the program calls none. Exceptions of the program are not caught, except an exit with status 0.
    """
    noted = _Noted(on_cpu=find(target).gpu is None)
    arguments, path, folder = sys.argv, sys.path, Path.cwd()
    sys.argv, sys.path = [str(script)], [str(script.absolute().parent), *path]
    try:
        with torch.compiler.set_stance("force_eager"), noted:
            runpy.run_path(str(script), run_name="__main__")
    except SystemExit as end:
        if end.code not in (None, 0):
            raise
    finally:
        sys.argv, sys.path = arguments, path
        os.chdir(folder)
    if not noted.workloads:
        raise ValueError(f"{script} calls none of the ops {', '.join(sorted(_READS))} with anything to compute")
    return list(noted.workloads.values()), dict(noted.calls)


# By op, its arguments whose sizes tell the workload's, and the one whose type is its.
_READS = {
    "address_decode": ("logits", "logits"),
    "address_decode_backward": ("logits", "logits"),
    "memory_scan": ("write_slots", "values"),
    "memory_scan_backward": ("write_slots", "values"),
    "memory_step": ("write_slots", "values"),
    "decode_heads": ("memory", "projected"),
}  # fmt: skip
_CONSTANTS: dict[str, tuple[str, ...]] = {
    "memory_scan": ("decay_power", "eps"),
    "memory_scan_backward": ("decay_power", "eps", "proxy_eps"),
    "memory_step": ("decay_power", "eps"),
    "decode_heads": ("decay_power", "eps"),
}


class _Noted(TorchDispatchMode):
    """Records calls of this project's ops and runs them."""

    def __init__(self, on_cpu: bool) -> None:
        super().__init__()
        self.on_cpu = on_cpu
        self.workloads: dict[str, Workload] = {}
        self.calls: Counter[str] = Counter()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        op = func._schema.name.removeprefix("ramnet::").replace("_packed", "")
        if func.namespace == "ramnet" and op in _READS and not (op == "decode_heads" and self.on_cpu):
            values = {argument.name: argument.default_value for argument in func._schema.arguments}
            values |= dict(zip(values, args, strict=False)) | (kwargs or {})
            for workload in self._workloads(op, values):
                if all(workload.shape.values()):
                    self.workloads.setdefault(workload.name, workload)
                    self.calls[workload.name] += 1
        return func(*args, **(kwargs or {}))

    def _workloads(self, op: Op, values: dict[str, Any]) -> list[Workload]:
        if "cu_seqlens" not in values:
            return [self._workload(op, values)]
        whole, lengths = self._workload(op, values), values["cu_seqlens"].diff().tolist()
        groups = [(len(group), max(lengths[i] for i in group)) for group in alike(lengths)]
        sizes = ({"N": rows * whole.shape["N"], "T": longest} for rows, longest in groups)
        return [whole.model_copy(update={"shape": whole.shape | size}) for size in sizes]

    def _workload(self, op: Op, values: dict[str, Any]) -> Workload:
        addresses, typed = (values[name] for name in _READS[op])
        if op.startswith("address_decode"):
            top_k = values["top_k"] if op == "address_decode" else values["slots"].shape[-1]
            sizes = (addresses.shape[:-2].numel(), *addresses.shape[-2:], top_k)
        elif op == "decode_heads":
            batch, heads, *state = addresses.shape
            sizes = (batch * heads, *(values[name] for name in ("order", "sub_dim", "top_k")), *state)
        else:
            batch, heads, *others = addresses.shape
            sizes = (batch * heads, *others, *values["memory"].shape[2:])
        dtype: torch.dtype = typed.dtype
        if self.on_cpu:  # CPU kernels compute in float32 or float64 for any dtype
            dtype = reference.sum_type(*(x for x in values.values() if isinstance(x, torch.Tensor)))
        return Workload.of(op, sizes, dtype, {name: values[name] for name in _CONSTANTS.get(op, ())})
