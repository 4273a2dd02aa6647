"""The type that a kernel sums in."""

from __future__ import annotations

import torch
import triton.language as tl


def in_triton(dtype: torch.dtype) -> tl.dtype:
    """``ramnet.ops.reference.sum_type`` as a kernel's constant."""
    return tl.float64 if dtype == torch.float64 else tl.float32
