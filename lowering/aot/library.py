"""Calls the library of a model from Python, on the weights of a module and the tensors of a ``RamState``."""

from __future__ import annotations

import ctypes
import os
import threading
from collections.abc import Sequence
from functools import cache
from pathlib import Path

from torch import Tensor

from ramnet.state import RamState

_Pointer = ctypes.c_void_p


@cache
def _load(path: Path) -> ctypes.CDLL:
    library = ctypes.CDLL(str(path))
    library.ramnet_message.restype = ctypes.c_char_p
    return library


class Library:
    """The library at ``path`` with the weights at ``pointers``, in the order of ``lowering.aot.weights.table``.

    The weights are read where they are, at every call. Any thread may call; calls with one state must not overlap.
    """

    def __init__(self, path: Path, pointers: Sequence[int], threads: int) -> None:
        self._process, self._model = os.getpid(), _Pointer()
        self._library = _load(path)
        self._here = threading.local()
        self._check(self._library.ramnet_wrap(_array(pointers), threads, ctypes.byref(self._model)))

    def __del__(self) -> None:
        # A forked process has none of the threads that closing waits for.
        if self._model and self._process == os.getpid():
            self._library.ramnet_close(self._model)

    def rebind(self, pointers: Sequence[int]) -> None:
        """Use other weights. No call may be running."""
        self._library.ramnet_rebind(self._model, _array(pointers))

    def token(self, token: int, state: RamState, logits: Tensor) -> None:
        """Read one token, updating ``state`` of one row in place, except for its position.

        Writes ``logits``, float32 [V]. All tensors are contiguous and in the CPU's memory. Raises ValueError for an id
        outside the vocabulary, and RuntimeError if a kernel fails.
        """
        tensors = [x.data_ptr() for x in (*state.memory, *state.mass, *state.conv)]
        held = self._held()
        self._library.ramnet_state_bind(held, _array(tensors), ctypes.c_int64(int(state.position)))
        self._check(self._library.ramnet_token(self._model, held, ctypes.c_int32(token), _Pointer(logits.data_ptr())))

    def _held(self) -> _Pointer:
        """Return this thread's state, which has scratch memory and borrows its tensors."""
        held = getattr(self._here, "state", None)
        if held is None:
            held = self._here.state = _State(self._library)
            self._check(self._library.ramnet_state_borrow(self._model, ctypes.byref(held.pointer)))
        return held.pointer

    def _check(self, status: int) -> None:
        if status:
            message = self._library.ramnet_message().decode(errors="replace")
            raise ValueError(message) if status == -1 else RuntimeError(message)


class _State:
    """A state of the library, freed with this object."""

    def __init__(self, library: ctypes.CDLL) -> None:
        self._library, self.pointer = library, _Pointer()

    def __del__(self) -> None:
        self._library.ramnet_state_free(self.pointer)


def _array(pointers: Sequence[int]) -> ctypes.Array[_Pointer]:
    return (_Pointer * len(pointers))(*pointers)
