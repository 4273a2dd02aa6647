"""The dtype in which a kernel sums."""

from __future__ import annotations

import torch
import triton.language as tl


def in_triton(dtype: torch.dtype) -> tl.dtype:
    """Convert a dtype of sums, float32 or float64, to Triton's, for use as a constant in kernels."""
    return tl.float64 if dtype == torch.float64 else tl.float32
