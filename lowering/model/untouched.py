"""Checks whether a module still computes what its class defines, so that a kernel may replace it.

Adapters replace a module, parametrisations change its class, and hooks or a ``forward`` set on the instance run around
or instead of the class's. The checks are made at every call.
"""

from __future__ import annotations

from itertools import repeat
from operator import contains, is_
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules import module as torch_module

# The methods by which models and their modules compute, which may be set on an instance, too.
COMPUTING = frozenset(
    ("forward", "hidden_states", "run_layers", "run_conv", "run_block", "run_head", "_call_conv", "_call_block")
)
# The classes of tensors whose data C code can read.
PLAIN = (Tensor, nn.Parameter)


def untouched(module: nn.Module, kind: type[nn.Module]) -> bool:
    """Return whether ``module`` is exactly of class ``kind`` and has no forward hooks or ``forward`` of its own."""
    own = module.__dict__
    return type(module) is kind and not own["_forward_hooks"] and not own["_forward_pre_hooks"] and "forward" not in own


def is_plain(tensor: Tensor | None, dtype: torch.dtype) -> bool:
    """Return whether C code can read the tensor: on the CPU, of ``dtype``, contiguous, and not of a tensor subclass."""
    return type(tensor) in PLAIN and tensor.is_cpu and tensor.dtype is dtype and tensor.is_contiguous()  # type: ignore[union-attr]


def is_hooked(module: nn.Module) -> bool:
    """Return whether the module or a submodule has hooks or a ``forward`` of its own.

    A function that torch.compile has compiled ignores hooks that are registered later.
    """
    return has_global_hooks() or any(_is_hooked(each.__dict__) for each in module.modules())


def _is_hooked(own: dict[str, Any]) -> bool:
    return bool(
        own["_forward_hooks"]
        or own["_forward_pre_hooks"]
        or own["_backward_hooks"]
        or own["_backward_pre_hooks"]
        or "forward" in own
    )


class Tree:
    """A snapshot of a model's modules, parameters and buffers, to detect later whether they were replaced.

    A check takes 60 µs for a model of 27 layers, so it can be made at each token.
    """

    def __init__(self, model: nn.Module) -> None:
        self.parameters = list(model.parameters())
        self._modules = list(model.modules())
        self._kinds = list(map(type, self._modules))
        self._owns = [module.__dict__ for module in self._modules]
        self._hooks = [own[name] for own in self._owns for name in ("_forward_hooks", "_forward_pre_hooks")]
        places = (own[kind] for own in self._owns for kind in ("_modules", "_parameters", "_buffers"))
        found = [(place, name, held) for place in places for name, held in place.items()]
        self._places, self._names, self._held = zip(*found, strict=True)

    def has_changed(self) -> bool:
        """Return whether a module, parameter or buffer was replaced, or a module's class changed."""
        held = map(dict.get, self._places, self._names)
        return not all(map(is_, held, self._held)) or list(map(type, self._modules)) != self._kinds

    def is_hooked(self) -> bool:
        """Return whether a module has forward hooks or a ``forward`` of its own, or global hooks exist."""
        return has_global_hooks() or any(self._hooks) or any(map(contains, self._owns, repeat("forward")))


def has_global_hooks() -> bool:
    """Return whether hooks that apply to all modules are registered."""
    return torch_module._has_any_global_hook()
