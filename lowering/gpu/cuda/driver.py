"""Launches cubins through NVIDIA's driver on torch tensors and torch's current stream.

Only the driver is needed, not TVM, whose CUDA runtime is built for one version of CUDA. Launches can be captured in a
CUDA graph.
"""

from __future__ import annotations

import ctypes
import json
from collections.abc import Sequence
from functools import cache
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

_MAX_DYNAMIC_SHARED_BYTES = 8  # CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES


class Cubin:
    """A cubin and the launch parameters of its functions.

    Args:
        cubin: the binary from nvcc.
        functions: for each function by name: ``arguments``, the tensors as (name, shape with dynamic sizes by name);
            ``parameters``, the names of the kernel's parameters; ``shared``, the bytes of dynamic shared memory; and
            ``resources``, the fields of ``lowering.gpu.resources.Resources``.
    """

    def __init__(self, cubin: bytes, functions: dict[str, dict[str, Any]]) -> None:
        self.cubin, self.functions = cubin, functions
        self._loaded: dict[tuple[int, str], ctypes.c_void_p] = {}

    @classmethod
    def read(cls, path: Path) -> Cubin:
        """Read a file that ``write`` wrote."""
        head, _, cubin = path.read_bytes().partition(b"\n")
        return cls(cubin, json.loads(head))

    def write(self, path: Path) -> None:
        """Write one file: a line of JSON, then the cubin."""
        path.write_bytes(json.dumps(self.functions).encode() + b"\n" + self.cubin)

    def run(self, name: str, tensors: Sequence[Tensor], grid: tuple[int, ...], threads: int) -> None:
        """Launch a function on contiguous tensors of one GPU. Raises ValueError if shapes do not match.

        ``grid`` is the number of programs along up to three axes; each program has ``threads`` threads.
        """
        values = self.bind(name, tensors)
        numbers = [ctypes.c_void_p(x) if kind else ctypes.c_int64(x) for x, kind in values]
        pointers = (ctypes.c_void_p * len(numbers))(*(ctypes.addressof(x) for x in numbers))
        with torch.cuda.device(tensors[0].device):
            _enter_context()
            _check(
                _driver().cuLaunchKernel(
                    self._function(name), *(*grid, 1, 1)[:3], threads, 1, 1, self.functions[name]["shared"],
                    ctypes.c_void_p(torch.cuda.current_stream().cuda_stream), pointers, None,
                )
            )  # fmt: skip

    def bind(self, name: str, tensors: Sequence[Tensor]) -> list[tuple[int, bool]]:
        """Return the values of the kernel's parameters, each with whether it is a pointer; raises as ``run`` does."""
        function = self.functions[name]
        sizes: dict[str, int] = {}
        addresses = {}
        if len(tensors) != len(function["arguments"]):
            raise ValueError(f"{name} takes {len(function['arguments'])} tensors, not {len(tensors)}")
        for (label, shape), tensor in zip(function["arguments"], tensors, strict=True):
            fits = len(shape) == tensor.dim() and all(
                size == (sizes.setdefault(axis, size) if isinstance(axis, str) else axis)
                for axis, size in zip(shape, tensor.shape, strict=True)
            )
            if not fits or not tensor.is_contiguous():
                raise ValueError(f"{name}: {label} is {list(tensor.shape)}; it must be contiguous and {shape}")
            addresses[f"{label}_ptr"] = tensor.data_ptr()
        return [(addresses[p], True) if p in addresses else (sizes[p], False) for p in function["parameters"]]

    def _function(self, name: str) -> ctypes.c_void_p:
        """Return the handle of a function, loaded on the current device."""
        key = torch.cuda.current_device(), name
        if key not in self._loaded:
            module, found = ctypes.c_void_p(), ctypes.c_void_p()
            _check(_driver().cuModuleLoadData(ctypes.byref(module), self.cubin))
            _check(_driver().cuModuleGetFunction(ctypes.byref(found), module, f"{name}_kernel".encode()))
            shared = self.functions[name]["shared"]
            _check(_driver().cuFuncSetAttribute(found, _MAX_DYNAMIC_SHARED_BYTES, shared))
            self._loaded[key] = found
        return self._loaded[key]


def _enter_context() -> None:
    """Make the device's primary context current in this thread.

    The CUDA runtime does so on a thread's first use of the device, but in a thread of a backward pass a launch through
    the driver may come first.
    """
    context = ctypes.c_void_p()
    _check(_driver().cuCtxGetCurrent(ctypes.byref(context)))
    if not context:
        # torch's tensors belong to the primary context, which torch keeps until the process ends.
        _check(_driver().cuDevicePrimaryCtxRetain(ctypes.byref(context), torch.cuda.current_device()))
        _check(_driver().cuCtxSetCurrent(context))


@cache
def _driver() -> Any:
    return ctypes.CDLL("libcuda.so.1")


def _check(status: int) -> None:
    """Raise RuntimeError with the driver's name of the error unless ``status`` is 0."""
    if status:
        name = ctypes.c_char_p()
        _driver().cuGetErrorName(status, ctypes.byref(name))
        raise RuntimeError(f"the CUDA driver returned {(name.value or b'error').decode()} ({status})")
