"""Reads a token of a whole model on a CPU by one call of a compiled library.

A call of a layer's kernel from Python takes tens of microseconds, more than the layer of a small model. The library
(``lowering/aot/``) reads the weights of the model where they are.
"""

from __future__ import annotations

import os
import threading
import warnings
from typing import Any

import torch
from torch import Tensor, nn

from lowering.aot.library import Library
from lowering.model.untouched import Tree, is_plain
from ramnet.ids import check_range, check_type
from ramnet.model import RamNetForCausalLM
from ramnet.state import RamState


class Token:
    """The library of ``model``, built at the first call that it serves."""

    def __init__(self, model: RamNetForCausalLM) -> None:
        self._model = model
        self._lock = threading.Lock()
        self._tree: Tree | None = None
        self._weights: list[Tensor | None] | None = None  # None if the library does not compute what the model does
        self._settings: list[tuple[dict[str, Any], str, Any]] = []
        self._shapes: list[torch.Size | None] = []
        self._pointers: list[int] = []
        self._libraries: dict[tuple[int, int], Library] = {}  # by process and number of threads
        self._unavailable = False

    def read(self, input_ids: Tensor, state: RamState) -> Tensor | None:
        """Read one token, [1, 1], updating ``state`` in place. Returns the logits [1, 1, V].

        Returns None, without doing so, for more tokens, with gradients enabled, if a tensor is not float32 or the
        model was changed so that the library does not fit, and if no library can be built here, of which one warning
        says why.

        Raises:
            TypeError, ValueError: for ids and states, as ``RamNetForCausalLM.forward`` does.
        """
        if input_ids.shape != (1, 1) or torch.is_grad_enabled() or torch.compiler.is_compiling():
            return None
        if not is_plain(input_ids, input_ids.dtype):
            return None
        library = self._library()
        if library is None:
            return None
        config = self._model.config
        check_type(input_ids)
        state.check(config, 1, input_ids.device, in_place=True)
        if not all(is_plain(x, torch.float32) for x in (*state.memory, *state.mass, *state.conv)):
            return None
        token = int(input_ids)
        if not 0 <= token < config.vocab_size:
            check_range(input_ids, config.vocab_size)
        logits = torch.empty(1, 1, config.vocab_size, dtype=torch.float32)
        library.token(token, state, logits)
        state.position.add_(1)
        return logits

    def _library(self) -> Library | None:
        if self._unavailable:
            return None
        with self._lock:
            if self._tree is None or self._tree.has_changed() or not self._are_settings_kept():
                self._tree = Tree(self._model)
                self._settings = [(vars(x), name, value) for x in self._model.modules() for name, value in _public(x)]
                self._weights = _weights(self._model) if is_as_built(self._model) else None
                self._shapes = [None if x is None else x.shape for x in self._weights or ()]
            if self._weights is None or self._tree.is_hooked():
                return None
            # ``parameter.data = other`` changes type, strides, shape and address without replacing the parameter.
            if not all(
                x is None or (is_plain(x, torch.float32) and x.shape == shape)
                for x, shape in zip(self._weights, self._shapes, strict=True)
            ):
                return None
            pointers = [0 if x is None else x.data_ptr() for x in self._weights]
            if pointers != self._pointers:
                for library in self._libraries.values():
                    library.rebind(pointers)
                self._pointers = pointers
            # A forked process has none of the threads of its parent.
            key = os.getpid(), torch.get_num_threads()
            if key not in self._libraries and (found := self._build(torch.get_num_threads())) is not None:
                self._libraries[key] = found
            return self._libraries.get(key)

    def _build(self, threads: int) -> Library | None:
        from lowering.aot import build

        try:
            return Library(build.shared_library(self._model.config), self._pointers, threads)
        except (ValueError, ImportError, RuntimeError, OSError) as error:
            warnings.warn(f"single tokens are computed layer by layer: {error}", stacklevel=6)
            self._unavailable = True
            return None

    def _are_settings_kept(self) -> bool:
        return all(own.get(name) is value for own, name, value in self._settings)


def is_as_built(model: RamNetForCausalLM) -> bool:
    """Return whether all modules are of the classes, sizes and settings that the model's config says."""
    with torch.device("meta"):
        fresh = RamNetForCausalLM(model.config)
    mine, new = (dict(each.named_modules()) for each in (model, fresh))
    shapes, expected = ({name: x.shape for name, x in each.named_parameters()} for each in (model, fresh))
    return (
        mine.keys() == new.keys()
        and shapes == expected
        and all(type(module) is type(new[name]) for name, module in mine.items())
        and all(vars(mine[name]).get(key) == value for name, module in new.items() for key, value in _public(module))
    )


def _public(module: nn.Module) -> list[tuple[str, Any]]:
    """Return the public attributes of a module, such as eps and config, which decide what it computes."""
    return [(name, value) for name, value in vars(module).items() if name[0] != "_" and name != "training"]


def _weights(model: RamNetForCausalLM) -> list[Tensor | None]:
    """Return the parameters in the library's order; None in place of the scales that float32 matrices do not have."""
    from lowering.aot import weights

    parameters = dict(model.named_parameters(remove_duplicate=False))
    return [parameters.get(name) for name, *_ in weights.table(model.config, "float32")]
