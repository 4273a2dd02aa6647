"""Types that kernels compute in."""

from __future__ import annotations

import torch
import triton.language as tl
from torch import Tensor


def sum_type(*tensors: Tensor) -> torch.dtype:
    """float64 where an input is, else float32."""
    return torch.float64 if any(x.dtype == torch.float64 for x in tensors) else torch.float32


def in_triton(dtype: torch.dtype) -> tl.dtype:
    """``sum_type`` as a kernel's constant."""
    return tl.float64 if dtype == torch.float64 else tl.float32
