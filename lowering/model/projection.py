"""Linear layers on one token on a CPU, at close to the memory's bandwidth.

On two cores with a bandwidth of 36 GB/s, torch reads the weight at 16 GB/s and ``lowering/cpu/project.py`` at 32 GB/s.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from lowering.model.untouched import has_global_hooks, is_plain, untouched_linear
from ramnet.ops import registered


def project(linear: nn.Module, x: Tensor, kernels: str) -> Tensor | None:
    """Compute W x, [1, 1, O], for a single row x [1, 1, I].

    Returns None if there are more rows, gradients are enabled, a tensor is not float32, or ``linear`` has a bias or was
    changed.
    """
    if x.numel() != x.shape[-1] or torch.is_grad_enabled() or has_global_hooks():
        return None
    weight = untouched_linear(linear)
    if not is_plain(weight, torch.float32) or not is_plain(x, torch.float32):
        return None
    backend: Any = registered(kernels)
    return backend.project(x, weight)
