"""flash-linear-attention's kernels for the recurrence of the baselines."""

from __future__ import annotations

from importlib.util import find_spec

import torch
from torch import Tensor


def applies(value: Tensor, removed: Tensor | None) -> bool:
    """Return whether the kernels compute the recurrence: they are installed, and take these dtypes on this device."""
    # Those with a term a bᵀ are not meant for float32: some refuse it, and the general one warns.
    dtypes = (torch.bfloat16,) if removed is not None else (torch.bfloat16, torch.float32)
    return value.is_cuda and value.dtype in dtypes and find_spec("fla") is not None


def linear_recurrence(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    log_decay: Tensor,
    removed: Tensor | None,
    replaced: Tensor | None,
) -> Tensor:
    """Compute ``ramnet.baselines.recurrence.linear_recurrence`` in the dtype of ``value``, with a state in float32.

    Products of float32 are made of TF32 numbers.
    """

    def arranged(x: Tensor) -> Tensor:
        return x.to(value.dtype).transpose(1, 2).contiguous()  # [B, T, H, ...]

    q, k, v = arranged(query), arranged(key), arranged(value)
    decay = log_decay.float().transpose(1, 2).contiguous()
    if removed is not None and replaced is not None:
        from fla.ops.generalized_delta_rule import chunk_dplr_delta_rule

        each = decay.expand(q.shape).contiguous()
        out, _ = chunk_dplr_delta_rule(q, k, v, arranged(removed), arranged(replaced), each, scale=1.0)
    elif decay.shape[-1] == 1:
        from fla.ops.simple_gla import chunk_simple_gla

        out, _ = chunk_simple_gla(q, k, v, g=decay.squeeze(-1), scale=1.0)
    else:
        from fla.ops.gla import chunk_gla

        out, _ = chunk_gla(q, k, v, g=decay, scale=1.0)
    return out.transpose(1, 2)
