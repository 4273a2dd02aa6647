"""Calls the library of a model from Python, on the weights of a module and the tensors of a ``RamState``.

All tensors are contiguous, float32 but for the position, and in the CPU's memory. Nothing here checks this, nor shapes:
``lowering.model.token`` does. Building the library needs TVM and a C compiler, calling it neither.
"""

from __future__ import annotations

import ctypes
import threading
import weakref
from collections.abc import Callable, Sequence
from functools import cache
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from lowering.aot.weights import BLOCK
from ramnet.state import RamState

_Pointer = ctypes.c_void_p


@cache
def _load(path: Path) -> ctypes.CDLL:
    library = ctypes.CDLL(str(path))
    library.ramnet_message.restype = ctypes.c_char_p
    return library


class Library:
    """The library at ``path``. Any thread may call; calls with one state must not overlap.

    Methods raise ValueError for an id outside the vocabulary, and RuntimeError if a kernel fails.
    """

    def __init__(self, path: Path, threads: int) -> None:
        self._library, self._model = _load(path), _Pointer()
        self._here = threading.local()
        self._pointers = [0] * self._library.ramnet_weight_count()
        status = self._library.ramnet_wrap(_array(_Pointer, self._pointers), threads, ctypes.byref(self._model))
        if status:
            raise _error(self._library, status)
        _finally(self, self._library.ramnet_close, self._model)

    def rebind(self, pointers: list[int]) -> None:
        """Read the weights at ``pointers``, in the order of ``lowering.aot.weights.table``, in ``step`` and ``tokens``.

        They are read where they are, at every call. If they are others than before, no call may be running.
        """
        if pointers != self._pointers:
            self._library.ramnet_rebind(self._model, _array(_Pointer, pointers))
            self._pointers = pointers

    def step(self, ids: Sequence[int], state: RamState, logits: Tensor) -> None:
        """Read one token of each of up to ``BLOCK`` rows, updating ``state`` in place, except for its position.

        Writes logits [B, 1, V].
        """
        self._call("step", self._bound(state), _array(ctypes.c_int32, ids), len(ids), _at(logits))

    def tokens(self, ids: Sequence[int], state: RamState, logits: Tensor) -> None:
        """Read tokens of one sequence, updating ``state`` in place, except for its position.

        Writes logits [1, n, V] of the last n tokens.
        """
        held = _Pointer(self._bound(state)[0])
        self._call("tokens", held, _array(ctypes.c_int32, ids), len(ids), _at(logits), logits.shape[1])

    def block(self, layer: int, pointers: list[int], state: tuple[Tensor, Tensor, Tensor], x: Tensor) -> None:
        """Run the block of a layer on one token of each of up to ``BLOCK`` rows, x [B, 1, C], which becomes the output.

        Args:
            pointers: the block's weights, in the order of ``rebind``.
            state: memory [B, H, M, D] and mass [B, H, M], which are updated in place, and position [B].
        """
        memory, mass, position = state
        wide = position.to(torch.int64)
        tensors = map(_at, (memory, mass, wide, x))
        self._call("block", self._held(), len(x), layer, _array(_Pointer, pointers), *tensors)

    def _bound(self, state: RamState) -> ctypes.Array[_Pointer]:
        """Return this thread's states, bound to the rows of ``state``."""
        held = self._held()
        tensors = _array(_Pointer, [x.data_ptr() for x in (*state.memory, *state.mass, *state.conv)])
        position = state.position.to(torch.int64)
        self._library.ramnet_state_bind(held, len(position), tensors, _at(position))
        return held

    def _held(self) -> ctypes.Array[_Pointer]:
        """Return this thread's states, which share scratch memory and borrow their tensors."""
        held = getattr(self._here, "states", None)
        if held is None:
            held = _States(self._library)
            self._call("state_borrow", BLOCK, held.pointers)
            self._here.states = held
        return held.pointers

    def _call(self, name: str, *arguments: Any) -> None:
        if status := getattr(self._library, f"ramnet_{name}")(self._model, *arguments):
            raise _error(self._library, status)


class _States:
    """States of the library, freed with this object."""

    def __init__(self, library: ctypes.CDLL) -> None:
        self.pointers = (_Pointer * BLOCK)()
        _finally(self, _free, library, self.pointers)


def _finally(owner: object, function: Callable[..., None], *arguments: Any) -> None:
    """Call the function when ``owner`` is deleted, but not at the end of the process, which frees all memory itself."""
    weakref.finalize(owner, function, *arguments).atexit = False


def _free(library: ctypes.CDLL, states: ctypes.Array[_Pointer]) -> None:
    for pointer in states:
        library.ramnet_state_free(_Pointer(pointer))


def _error(library: ctypes.CDLL, status: int) -> Exception:
    message = library.ramnet_message().decode(errors="replace")
    return ValueError(message) if status == -1 else RuntimeError(message)


def _array(kind: Any, values: Sequence[int]) -> Any:
    return (kind * len(values))(*values)


def _at(tensor: Tensor) -> _Pointer:
    return _Pointer(tensor.data_ptr())
