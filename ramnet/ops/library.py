"""The ops as ``torch.library`` custom ops in the namespace ``ramnet``, opaque to torch.compile and torch.export.

The last argument, ``kernels``, names the backend and is empty for the reference. It is an argument rather than a
global, so that a compiled graph and a backward pass keep the backend of the forward.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd.graph import increment_version

from ramnet.ops import reference
from ramnet.ops.accesses import Accesses
from ramnet.ops.backend import registered


@torch.library.custom_op("ramnet::address_decode", mutates_args=())
def address_decode(logits: Tensor, top_k: int, kernels: str = "") -> tuple[Tensor, Tensor]:
    """``ramnet.ops.address_decode`` without its argument checks, returning weights before slots: torch's opcheck adds
    the other outputs to the first in place, and an int32 tensor cannot take a float.
    """
    slots, weights = (registered(kernels) if kernels else reference).address_decode(logits, top_k)
    return weights, slots


@address_decode.register_fake
def _(logits: Tensor, top_k: int, kernels: str = "") -> tuple[Tensor, Tensor]:
    shape = (*logits.shape[:-2], top_k)
    return logits.new_empty(shape), logits.new_empty(shape, dtype=torch.int32)


@torch.library.custom_op("ramnet::address_decode_backward", mutates_args=())
def address_decode_backward(
    grad_weights: Tensor, logits: Tensor, slots: Tensor, weights: Tensor, kernels: str = ""
) -> Tensor:
    """The gradient of ``logits``, [..., U, P]; shapes as in ``address_decode``."""
    backend = registered(kernels) if kernels else reference
    return backend.address_decode_backward(grad_weights, logits, slots, weights)


@address_decode_backward.register_fake
def _(grad_weights: Tensor, logits: Tensor, slots: Tensor, weights: Tensor, kernels: str = "") -> Tensor:
    return logits.new_empty(logits.shape)


def _save_address_decode(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    logits, _, ctx.kernels = inputs
    weights, slots = output
    ctx.mark_non_differentiable(slots)
    ctx.save_for_backward(logits, slots, weights)


def _differentiate_address_decode(ctx: Any, grad_weights: Tensor, _: Any) -> tuple[Tensor, None, None]:
    return address_decode_backward(grad_weights, *ctx.saved_tensors, ctx.kernels), None, None


address_decode.register_autograd(_differentiate_address_decode, setup_context=_save_address_decode)


@torch.library.custom_op("ramnet::memory_scan", mutates_args=())
def memory_scan(
    write_slots: Tensor,
    write_weights: Tensor,
    read_slots: Tensor,
    read_weights: Tensor,
    values: Tensor,
    memory: Tensor,
    mass: Tensor,
    decay_power: float = 1.0,
    eps: float = 1e-6,
    proxy_eps: float = 0.01,
    kernels: str = "",
) -> tuple[Tensor, Tensor, Tensor]:
    """``ramnet.ops.memory_scan`` without its argument checks."""
    accesses = Accesses(write_slots, write_weights, read_slots, read_weights)
    return (registered(kernels) if kernels else reference).memory_scan(
        accesses, values, memory, mass, decay_power, eps, proxy_eps
    )


@memory_scan.register_fake
def _(
    write_slots: Tensor, write_weights: Tensor, read_slots: Tensor, read_weights: Tensor,
    values: Tensor, memory: Tensor, mass: Tensor,
    decay_power: float = 1.0, eps: float = 1e-6, proxy_eps: float = 0.01, kernels: str = "",
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    return values.new_empty(values.shape), memory.new_empty(memory.shape), mass.new_empty(mass.shape)


@torch.library.custom_op("ramnet::memory_scan_backward", mutates_args=())
def memory_scan_backward(
    grad_output: Tensor,
    grad_memory: Tensor,
    grad_mass: Tensor,
    write_slots: Tensor,
    write_weights: Tensor,
    read_slots: Tensor,
    read_weights: Tensor,
    values: Tensor,
    memory: Tensor,
    mass: Tensor,
    decay_power: float,
    eps: float,
    proxy_eps: float,
    kernels: str = "",
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """The gradients of write_weights, read_weights, values, memory and mass."""
    grads = (grad_output, grad_memory, grad_mass)
    accesses = Accesses(write_slots, write_weights, read_slots, read_weights)
    return (registered(kernels) if kernels else reference).memory_scan_backward(
        grads, accesses, values, memory, mass, decay_power, eps, proxy_eps
    )


@memory_scan_backward.register_fake
def _(
    grad_output: Tensor, grad_memory: Tensor, grad_mass: Tensor,
    write_slots: Tensor, write_weights: Tensor, read_slots: Tensor, read_weights: Tensor,
    values: Tensor, memory: Tensor, mass: Tensor,
    decay_power: float, eps: float, proxy_eps: float, kernels: str = "",
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    differentiable = (write_weights, read_weights, values, memory, mass)
    w, r, v, s, z = (x.new_empty(x.shape) for x in differentiable)
    return w, r, v, s, z


def save_scan_inputs(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    """Save the inputs of a scan for its backward, which recomputes the rows of the memory."""
    *tensors, ctx.decay_power, ctx.eps, ctx.proxy_eps, ctx.kernels = inputs
    ctx.save_for_backward(*tensors)


def _differentiate_memory_scan(
    ctx: Any, grad_output: Tensor, grad_memory: Tensor, grad_mass: Tensor
) -> tuple[Tensor | None, ...]:
    grad_w, grad_r, grad_v, grad_s, grad_z = memory_scan_backward(
        grad_output, grad_memory, grad_mass, *ctx.saved_tensors,
        ctx.decay_power, ctx.eps, ctx.proxy_eps, ctx.kernels,
    )  # fmt: skip
    return None, grad_w, None, grad_r, grad_v, grad_s, grad_z, None, None, None, None


memory_scan.register_autograd(_differentiate_memory_scan, setup_context=save_scan_inputs)


# Defined by its schema: torch.library.custom_op adds a wrapper to ops that mutate arguments, which takes 68 µs a call
# instead of 5, and decoding calls this op in every layer.
_LIBRARY = torch.library.Library("ramnet", "FRAGMENT")
_LIBRARY.define(
    "memory_step(Tensor write_slots, Tensor write_weights, Tensor read_slots, Tensor read_weights, Tensor values,"
    " Tensor(a!) memory, Tensor(b!) mass, float decay_power=1.0, float eps=1e-6, str kernels='') -> Tensor"
)
memory_step = torch.ops.ramnet.memory_step.default


def _memory_step(
    write_slots: Tensor, write_weights: Tensor, read_slots: Tensor, read_weights: Tensor,
    values: Tensor, memory: Tensor, mass: Tensor,
    decay_power: float = 1.0, eps: float = 1e-6, kernels: str = "",
) -> Tensor:  # fmt: skip
    accesses = Accesses(write_slots, write_weights, read_slots, read_weights)
    if not kernels:
        return reference.memory_step(accesses, values, memory, mass, decay_power, eps)
    output = registered(kernels).memory_step(accesses, values, memory, mass, decay_power, eps)
    # A kernel writes without torch's knowledge. A later backward pass that needs the old state is an error now.
    increment_version((memory, mass))
    return output


_LIBRARY.impl("memory_step", _memory_step, "CompositeExplicitAutograd")


@torch.library.register_fake("ramnet::memory_step")
def _(
    write_slots: Tensor, write_weights: Tensor, read_slots: Tensor, read_weights: Tensor,
    values: Tensor, memory: Tensor, mass: Tensor,
    decay_power: float = 1.0, eps: float = 1e-6, kernels: str = "",
) -> Tensor:  # fmt: skip
    return values.new_empty(values.shape)
