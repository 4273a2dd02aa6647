"""Checks whether a module still computes what its config says, so that code made from the config may replace it."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from operator import is_
from typing import Any

import torch
from torch import Tensor, nn

from lowering.model.untouched import COMPUTING, PLAIN, Tree


class AsBuilt:
    """A module, and a snapshot of it that was compared with one that is newly made.

    Args:
        module: a model or a part of it.
        make: makes the module of its config.
        names: the parameters that ``pointers`` returns. Names that the module does not have stand for no memory.
    """

    def __init__(self, module: nn.Module, make: Callable[[], nn.Module], names: Sequence[str]) -> None:
        self.module, self._make, self._names = module, make, names
        self._tree: Tree | None = None
        self._settings: tuple[Sequence[dict[str, Any]], Sequence[str], Sequence[Any]] = (), (), ()
        self._is_as_built = False
        self._named: list[Tensor | None] = []
        self._weights: list[Tensor] = []
        self._facts: list[tuple[Any, ...]] = []

    def pointers(self) -> list[int] | None:
        """Return the addresses of the parameters, which are all contiguous float32 on the CPU; 0 for no memory.

        Returns None if the module differs from a newly made one in more than values, or has hooks. Changes since the
        last call are found.
        """
        if self._tree is None or self._tree.has_changed() or not self._are_settings_kept():
            self._tree = Tree(self.module)
            self._look()
        if not self._is_as_built or self._tree.is_hooked():
            return None
        # ``parameter.data = other`` changes type, shape, strides, device and address without replacing the parameter.
        if [(x.dtype, x.shape, x.is_contiguous(), x.is_cpu) for x in self._weights] != self._facts:
            return None
        return [0 if x is None else x.data_ptr() for x in self._named]

    def _look(self) -> None:
        settings = [(vars(each), name, value) for each in self.module.modules() for name, value in _public(each)]
        owners, names, values = zip(*settings, strict=True)
        self._settings = owners, names, values
        parameters = dict(self.module.named_parameters(remove_duplicate=False))
        self._named = [parameters.get(name) for name in self._names]
        self._weights = [x for x in self._named if x is not None]
        self._is_as_built = is_as_built(self.module, self._make) and all(type(x) in PLAIN for x in self._weights)
        self._facts = [(torch.float32, x.shape, True, True) for x in self._weights]

    def _are_settings_kept(self) -> bool:
        owners, names, values = self._settings
        return all(map(is_, map(dict.get, owners, names), values))


def is_as_built(module: nn.Module, make: Callable[[], nn.Module]) -> bool:
    """Return whether all modules are of the classes, sizes and settings that ``make`` gives them, and compute by the
    methods of their classes."""
    with torch.device("meta"):
        fresh = make()
    mine, new = (dict(each.named_modules()) for each in (module, fresh))
    shapes, expected = ({name: x.shape for name, x in each.named_parameters()} for each in (module, fresh))
    return (
        mine.keys() == new.keys()
        and shapes == expected
        and all(type(part) is type(new[name]) for name, part in mine.items())
        and all(COMPUTING.isdisjoint(vars(part)) for part in mine.values())
        and all(vars(mine[name]).get(key) == value for name, part in new.items() for key, value in _public(part))
    )


def _public(module: nn.Module) -> list[tuple[str, Any]]:
    """Return the public attributes of a module, such as eps and config, which decide what it computes."""
    return [(name, value) for name, value in vars(module).items() if name[0] != "_" and name != "training"]
