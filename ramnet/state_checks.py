"""What a state must be to go on from it."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise
from typing import Protocol

import torch
from torch import Tensor, nn

from ramnet.config import RamLayerConfig, RamNetConfig

# More tokens than this have no position: a sum with the length of a prompt would not fit in int64, or in int32.
MOST_TOKENS, MOST_INT32_TOKENS = 2**62, 2**30


class Layer(Protocol):
    """The part of ``ramnet.RamLayer`` that determines the shapes of its state."""

    config: RamLayerConfig


class State(Protocol):
    """A ``ramnet.RamState``."""

    memory: list[Tensor]
    mass: list[Tensor]
    conv: list[Tensor]
    position: Tensor


def shapes_of(layers: RamNetConfig | Sequence[Layer], batch_size: int) -> dict[str, list[tuple[int, ...]]]:
    """Return the shapes of memory, mass and conv for each layer."""
    convs: list[tuple[int, ...]] = []
    if isinstance(layers, RamNetConfig):
        convs = [(batch_size, layers.conv_kernel - 1, layers.hidden_size)] * layers.conv_layers
        configs: Sequence[RamLayerConfig] = layers.layers
    else:
        configs = [layer.config for layer in layers]
    heads: list[tuple[int, ...]] = [(batch_size, c.num_heads, c.slots) for c in configs]
    return {"memory": [(*h, c.value_dim) for h, c in zip(heads, configs, strict=True)], "mass": heads, "conv": convs}


def check_state(
    state: State, layers: RamNetConfig | Sequence[Layer], batch_size: int, device: torch.device, in_place: bool
) -> None:
    """Do what ``RamState.check`` promises."""
    for name, shapes in shapes_of(layers, batch_size).items():
        tensors: list[Tensor] = getattr(state, name)
        if len(tensors) != len(shapes):
            raise ValueError(f"state.{name} has {len(tensors)} layers; this model has {len(shapes)}")
        for i, (tensor, shape) in enumerate(zip(tensors, shapes, strict=True)):
            _check(f"state.{name}[{i}]", tensor, shape, device, in_place)
            if not tensor.is_floating_point():
                raise TypeError(f"state.{name}[{i}] is {tensor.dtype}; it must be a floating type")
    for i, (memory, mass) in enumerate(zip(state.memory, state.mass, strict=True)):
        if memory.dtype != mass.dtype:
            raise TypeError(f"state.mass[{i}] is {mass.dtype} but state.memory[{i}] is {memory.dtype}; use one type")
    if in_place and batch_size and not torch.compiler.is_compiling():
        _check_apart(state)
    _check("state.position", state.position, (batch_size,), device, in_place)
    if state.position.dtype not in (torch.int64, torch.int32):
        raise TypeError(f"state.position is {state.position.dtype}; it must be torch.int64")
    if can_be_read(state.position) and batch_size:
        positions = state.position.tolist()
        lowest, highest = min(positions), max(positions)
        most = MOST_TOKENS if state.position.dtype == torch.int64 else MOST_INT32_TOKENS
        if lowest < 0 or highest > most:
            wrong = lowest if lowest < 0 else highest
            raise ValueError(f"state.position holds {wrong}; it must be in 0..2^{most.bit_length() - 1}")


def _check(name: str, tensor: Tensor, shape: tuple[int, ...], device: torch.device, in_place: bool) -> None:
    if tensor.shape != shape:
        raise ValueError(f"{name} has shape {list(tensor.shape)}; it must be {list(shape)}")
    if tensor.device != device:
        raise ValueError(f"{name} is on {tensor.device} but input_ids is on {device}")
    if not in_place:
        return
    if not tensor.is_contiguous():
        raise ValueError(f"{name} has strides {list(tensor.stride())}; only a contiguous state is updated in place")
    if tensor.requires_grad and torch.is_grad_enabled():
        raise ValueError(f"{name} requires gradients, which a state that is updated in place cannot have")
    if not torch.compiler.is_compiling() and tensor.is_inference() and not torch.is_inference_mode_enabled():
        raise ValueError(
            f"{name} was made in torch.inference_mode() and cannot be updated in place outside it; use state.clone()"
        )


def _check_apart(state: State) -> None:
    """Raise ValueError if any two tensors of the state overlap, but for the position."""
    tensors = [*state.memory, *state.mass, *state.conv]
    places = sorted([(x.data_ptr(), i) for i, x in enumerate(tensors)])
    for (begin, i), (end, j) in pairwise(places):
        # 0 is the address of an empty tensor, and of one that stands for another while a graph is traced.
        if begin and begin + tensors[i].nbytes > end:
            kinds = ("memory", "mass", "conv")
            names = [f"state.{kind}[{layer}]" for kind in kinds for layer in range(len(getattr(state, kind)))]
            one, other = names[min(i, j)], names[max(i, j)]
            raise ValueError(
                f"{other} and {one} overlap in memory, and a state is updated in place; each layer needs its own"
            )


def check_no_gradients(module: nn.Module, x: Tensor) -> None:
    """Raise ValueError if gradients of ``x`` or a parameter of ``module`` are asked for, as in place there are none."""
    if torch.is_grad_enabled() and (x.requires_grad or any(each.requires_grad for each in module.parameters())):
        raise ValueError("in_place is True, which computes no gradients; call it under torch.no_grad()")


def can_be_read(tensor: Tensor) -> bool:
    """Return whether values can be read without synchronising: on the CPU, and not while a graph is traced."""
    return tensor.device.type == "cpu" and not torch.compiler.is_compiling()
