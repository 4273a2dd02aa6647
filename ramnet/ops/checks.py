"""Argument checks of the ops.

Shapes, dtypes and the range of slots are checked at every call, before anything is written. Checking that slots are
distinct and logits finite takes a pass over the data: the reference always does it, kernels only on request.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.autograd import forward_ad

from ramnet.config import check_constants
from ramnet.ops.accesses import Accesses

_INTEGERS = (int, torch.SymInt, torch.uint8, torch.int8, torch.int16, torch.int32, torch.int64)


class LogitsError(ValueError):
    """A sub-vector's logits have no softmax."""


def _floating(name: str, tensor: Tensor) -> None:
    if not tensor.dtype.is_floating_point:
        raise TypeError(f"{name} is {tensor.dtype}; it must be a floating type")


def _shape(name: str, tensor: Tensor, expected: Sequence[int], axes: str) -> None:
    if tuple(tensor.shape) != tuple(expected):
        raise ValueError(f"{name} has shape {list(tensor.shape)}; {axes} is {list(expected)} here")


def _no_tangents(*tensors: Tensor) -> None:
    """Raise NotImplementedError for dual tensors of forward-mode differentiation, which the ops would take for plain
    ones."""
    if torch.compiler.is_compiling() or forward_ad._current_level < 0:
        return
    if any(x.is_floating_point() and forward_ad.unpack_dual(x).tangent is not None for x in tensors):
        raise NotImplementedError("the memory ops have no forward-mode derivative; use a backward pass")


def address_decode(logits: Tensor, top_k: int) -> None:
    """Check shapes and dtypes of ``ramnet.ops.address_decode``."""
    _no_tangents(logits)
    _floating("logits", logits)
    if logits.dim() < 2 or logits.shape[-2] < 1 or logits.shape[-1] < 1:
        raise ValueError(f"logits has shape {list(logits.shape)}; it must be [..., U, P] with U and P at least 1")
    order, sub_dim = logits.shape[-2:]
    if not isinstance(top_k, int | torch.SymInt):
        raise TypeError(f"top_k is {top_k}; it must be an int")
    slots = sub_dim**order
    if slots > 2**31 - 1:
        raise ValueError(f"P^U is {sub_dim}^{order} slots; int32 numbers at most {2**31 - 1}")
    if not 1 <= top_k <= slots:
        raise ValueError(f"top_k is {top_k}; with U = {order} and P = {sub_dim} it must be in 1..{slots}")


def memory_scan(
    accesses: Accesses[Tensor],
    values: Tensor,
    memory: Tensor,
    mass: Tensor,
    decay_power: float,
    eps: float,
    proxy_eps: float,
    time: tuple[str, ...] = ("T",),
) -> None:
    """Check shapes, dtypes and devices of ``ramnet.ops.memory_scan``; ``time`` names the axes between H and K or D."""
    _no_tangents(*accesses, values, memory, mass)
    write_slots, write_weights, read_slots, read_weights = accesses
    rank = 3 + len(time)
    axes = ", ".join(("B", "H", *time))
    if values.dim() != rank or values.shape[-1] < 1:
        raise ValueError(f"values has shape {list(values.shape)}; it must be [{axes}, D] with D >= 1")
    *leading, value_dim = values.shape
    if write_slots.dim() != rank or write_slots.shape[-1] < 1:
        raise ValueError(f"write_slots has shape {list(write_slots.shape)}; it must be [{axes}, K] with K >= 1")
    shape = [*leading, write_slots.shape[-1]]
    for name, slots in (("write_slots", write_slots), ("read_slots", read_slots)):
        if slots.dtype != torch.int32:
            raise TypeError(f"{name} is {slots.dtype}; it must be torch.int32")
        _shape(name, slots, shape, f"[{axes}, K]")
    for name, weights in (("write_weights", write_weights), ("read_weights", read_weights)):
        _floating(name, weights)
        _shape(name, weights, shape, f"[{axes}, K]")
    if read_weights.dtype != write_weights.dtype:
        raise TypeError(
            f"read_weights is {read_weights.dtype} but write_weights is {write_weights.dtype}; use one type"
        )
    _floating("values", values)
    _floating("memory", memory)
    if memory.dim() != 4:
        raise ValueError(f"memory has shape {list(memory.shape)}; it must be [B, H, M, D]")
    slots_count = memory.shape[2]
    _shape("memory", memory, [*leading[:2], slots_count, value_dim], "[B, H, M, D]")
    _shape("mass", mass, [*leading[:2], slots_count], "[B, H, M]")
    if mass.dtype != memory.dtype:
        raise TypeError(f"mass is {mass.dtype} but memory is {memory.dtype}; use one type")
    if write_slots.shape[-1] > slots_count:
        raise ValueError(f"K is {write_slots.shape[-1]} but there are only M = {slots_count} slots")
    for name, tensor in (("write_slots", write_slots), ("write_weights", write_weights), ("mass", mass),
                         ("read_slots", read_slots), ("read_weights", read_weights), ("memory", memory)):  # fmt: skip
        if tensor.device != values.device:
            raise ValueError(f"{name} is on {tensor.device} but values is on {values.device}; use one device")
    check_constants(decay_power, eps, proxy_eps)


def documents(cu_seqlens: Tensor, values: Tensor, memory: Tensor, mass: Tensor) -> None:
    """Shapes and type of documents packed in one row, and of a state for each of them."""
    if cu_seqlens.dtype != torch.int64:
        raise TypeError(f"cu_seqlens is {cu_seqlens.dtype}; it must be torch.int64")
    if cu_seqlens.dim() != 1 or len(cu_seqlens) < 2:
        raise ValueError(f"cu_seqlens has shape {list(cu_seqlens.shape)}; it must be [R + 1] with R >= 1")
    if values.shape[:1] != (1,):
        raise ValueError(f"values has shape {list(values.shape)}; packed documents are one row, [1, H, T, D]")
    for name, state in (("memory", memory), ("mass", mass)):
        if state.shape[:1] != (len(cu_seqlens) - 1,):
            raise ValueError(f"{name} has shape {list(state.shape)}; it must begin with R = {len(cu_seqlens) - 1}")


def memory_step(
    accesses: Accesses[Tensor], values: Tensor, memory: Tensor, mass: Tensor, decay_power: float, eps: float
) -> None:
    """Check shapes, dtypes and devices of ``ramnet.ops.memory_step``, and that its state is contiguous."""
    memory_scan(accesses, values, memory, mass, decay_power, eps, 1.0, time=())
    for name, tensor in (("memory", memory), ("mass", mass)):
        if not tensor.is_contiguous():
            raise ValueError(f"{name} has strides {list(tensor.stride())}; memory_step updates only contiguous state")
    if torch.is_grad_enabled():
        named = {"write_weights": accesses.write_weights, "read_weights": accesses.read_weights, "values": values,
                 "memory": memory, "mass": mass}  # fmt: skip
        for name, tensor in named.items():
            if tensor.requires_grad:
                raise ValueError(f"{name} requires gradients, which memory_step does not compute; use torch.no_grad()")


def cyclic_shift(slots: Tensor, position: int | Tensor, num_slots: int) -> None:
    """Check dtypes and the number of slots of ``ramnet.ops.cyclic_shift``."""
    if num_slots <= 0:
        raise ValueError(f"num_slots is {num_slots}; it must be positive")
    for name, value in (("slots", slots), ("position", position)):
        kind = value.dtype if isinstance(value, Tensor) else type(value)
        if kind not in _INTEGERS:
            raise TypeError(f"{name} is {kind}; it must be an integer type")


def logits_are_numbers(logits: Tensor) -> None:
    """Raise LogitsError if a sub-vector's softmax is undefined: it holds NaN or +inf, or nothing but -inf."""
    largest = logits.amax(dim=-1)  # [..., U]; amax propagates NaN
    if not bool(largest.isfinite().all()):
        where = (~largest.isfinite()).nonzero()[0].tolist()
        raise LogitsError(f"logits{where} has {float(largest[tuple(where)])} as its largest entry; it must be finite")


def slots_in_range(accesses: Accesses[Tensor], num_slots: int) -> None:
    """Raise ValueError if a slot is outside 0..M-1."""
    for name, slots in _slots(accesses):
        outside = (slots < 0) | (slots >= num_slots)
        if bool(outside.any()):
            where = outside.nonzero()[0].tolist()
            raise ValueError(f"{name}{where} is {int(slots[tuple(where)])}; slots must be in 0..{num_slots - 1}")


def slots_in_range_on_device(accesses: Accesses[Tensor], num_slots: int) -> None:
    """Queue the check of ``slots_in_range`` on a GPU, without synchronising.

    A slot out of range triggers a device-side assertion, as in torch's indexing.
    """
    for name, slots in _slots(accesses):
        if slots.numel():
            low, high = slots.aminmax()
            torch._assert_async((low >= 0) & (high < num_slots), f"a slot of {name} is outside 0..{num_slots - 1}")


def slots_are_valid(accesses: Accesses[Tensor], num_slots: int) -> None:
    """Raise ValueError if a slot is outside 0..M-1 or repeated within a token."""
    slots_in_range(accesses, num_slots)
    for name, slots in _slots(accesses):
        ordered = slots.sort(dim=-1).values
        repeated = ordered[..., 1:] == ordered[..., :-1]
        if bool(repeated.any()):
            *token, k = repeated.nonzero()[0].tolist()
            slot = int(ordered[(*token, k)])
            raise ValueError(f"{name}{token} holds slot {slot} twice; the K slots of a token must be distinct")


def _slots(accesses: Accesses[Tensor]) -> tuple[tuple[str, Tensor], tuple[str, Tensor]]:
    return ("write_slots", accesses.write_slots), ("read_slots", accesses.read_slots)
