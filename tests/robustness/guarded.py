"""Tensors between inaccessible pages: an access one byte outside crashes the process."""

from __future__ import annotations

import ctypes
import mmap
import weakref
from typing import Any, Literal

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode

_libc = ctypes.CDLL(None, use_errno=True)
_libc.mmap.restype = ctypes.c_void_p
_libc.mmap.argtypes = (ctypes.c_void_p, ctypes.c_size_t, *(ctypes.c_int,) * 3, ctypes.c_long)
_libc.munmap.argtypes = (ctypes.c_void_p, ctypes.c_size_t)
_libc.mprotect.argtypes = (ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int)

Edge = Literal["first", "last"]
_NO_ACCESS = 0
_PAGE = mmap.PAGESIZE


def guarded(tensor: Tensor, edge: Edge) -> Tensor:
    """A contiguous copy whose first, or last, byte is that of its page, with a page without access before and behind.

    With "last" it begins wherever its size puts it, on no other boundary than its type's.
    """
    size = tensor.numel() * tensor.element_size()
    if not size:
        return tensor.contiguous()
    inside = -(-size // _PAGE) * _PAGE
    whole = inside + 2 * _PAGE
    start = _libc.mmap(None, whole, mmap.PROT_READ | mmap.PROT_WRITE, mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS, -1, 0)
    if start in (None, ctypes.c_void_p(-1).value):
        raise MemoryError(f"mmap of {whole} bytes failed")
    for guard in (start, start + _PAGE + inside):
        assert _libc.mprotect(guard, _PAGE, _NO_ACCESS) == 0
    first = start + _PAGE + (inside - size if edge == "last" else 0)
    buffer = (ctypes.c_char * size).from_address(first)
    weakref.finalize(buffer, _libc.munmap, start, whole)
    return torch.frombuffer(buffer, dtype=tensor.dtype).view(tensor.shape).copy_(tensor)


class GuardedResults(TorchFunctionMode):
    """Within it what is allocated for results is guarded too, and holds NaN, or a wild number, where nothing is
    written."""

    _MAKERS = (torch.empty, torch.empty_like, Tensor.new_empty)

    def __init__(self, edge: Edge) -> None:
        super().__init__()
        self.edge = edge

    def __torch_function__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = function(*args, **(kwargs or {}))
        if function in self._MAKERS and result.device.type == "cpu":
            wild = torch.nan if result.is_floating_point() else -(2**30)
            return guarded(torch.full_like(result, wild, memory_format=torch.contiguous_format), self.edge)
        return result
