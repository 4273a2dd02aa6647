"""The plans of address_decode and its backward by TIR; each thread handles one row of logits."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from lowering.gpu.address_decode.work import backward, decode
from lowering.gpu.plan import Plan
from lowering.gpu.tir import Kernels, TirLaunch
from schedules.gpu.address import AddressDecode, AddressDecodeBackward


def plan(rows: Tensor, top_k: int, schedule: AddressDecode) -> Plan:
    """Plan address_decode by TIR; see ``lowering.gpu.address_decode.triton.plan``."""
    count, order, sub_dim = rows.shape
    slots = rows.new_empty((count, top_k), dtype=torch.int32)
    weights = rows.new_empty((count, top_k))
    kernels = Kernels(_decode, "address_decode", (*rows.shape, top_k), rows.dtype, rows.dtype, schedule)
    work = decode(count, order, sub_dim, top_k, rows.element_size(), schedule)
    tensors = (rows, slots, weights)
    launch = TirLaunch(kernels, "address_decode", (work.programs,), tensors, schedule.threads, work)
    return Plan((launch,), (slots, weights))


def plan_backward(
    grad_weights: Tensor, logits: Tensor, slots: Tensor, weights: Tensor, schedule: AddressDecodeBackward
) -> Plan:
    """Plan address_decode_backward by TIR; see ``lowering.gpu.address_decode.triton_backward.plan``."""
    count, order, sub_dim = logits.shape
    top_k, dtype = slots.shape[1], logits.dtype
    grad_logits = torch.empty_like(logits)
    kernels = Kernels(_backward, "address_decode_backward", (*logits.shape, top_k), dtype, dtype, schedule)
    work = backward(count, order, sub_dim, top_k, logits.element_size(), schedule)
    tensors = (grad_weights.to(dtype), logits, slots, weights.to(dtype), grad_logits)
    launch = TirLaunch(kernels, "address_decode_backward", (work.programs,), tensors, schedule.threads, work)
    return Plan((launch,), (grad_logits,))


def _decode(*how: Any) -> Any:
    from lowering.gpu.address_decode.template import module

    return module(*how)


def _backward(*how: Any) -> Any:
    from lowering.gpu.address_decode.template import module_backward

    return module_backward(*how)
