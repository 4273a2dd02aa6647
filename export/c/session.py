"""Runs an exported C library from Python, without PyTorch."""

from __future__ import annotations

import ctypes
import operator
import os
import platform
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

from export.folder import DESCRIPTION
from export.library_path import new_path
from export.manifest import Manifest

LIBRARY, WEIGHTS = "libramnet.so", "weights.safetensors"


class CModel:
    """The C library of one model and the weights in a file.

    Args:
        library: the shared library. If ramnet.json lies beside it, the digests of all files that it names are checked
            before the library is loaded, which runs its code: load it only if you trust where it comes from.
        weights: the file that was exported with it.
        threads: the number of threads of the library.

    Raises:
        OSError: if the system cannot load the library, or the CPU lacks instructions that it is compiled to.
        ValueError: if a file is missing or damaged, the library is not one that was exported, the weights are of
            another model, or ``threads`` is not in 1..2^31 − 1.
    """

    def __init__(self, library: str | Path, weights: str | Path, threads: int = 1) -> None:
        self._model = ctypes.c_void_p()
        library = Path(library)
        if library.with_name(DESCRIPTION).is_file():
            Manifest.load(library.parent)
        if not isinstance(threads, int) or not 1 <= threads < 2**31:
            raise ValueError(f"threads is {threads}; it must be in 1..2^31 - 1")
        self._c = _load(library)
        self.vocabulary = int(self._c.ramnet_vocabulary())
        self.call("open", os.fsencode(weights), threads, ctypes.byref(self._model))

    def __del__(self) -> None:
        if self._model:
            self._c.ramnet_close(self._model)

    def state(self) -> CState:
        """Return a state before the first token."""
        return CState(self)

    def token(self, state: CState, token: int) -> NDArray[np.float32]:
        """Read one token. Returns the logits, float32 [V]; raises as ``tokens`` does."""
        pointer, (token,) = self._pointer(state), self._ids([token])
        logits = np.empty(self.vocabulary, np.float32)
        self.call("token", self._model, pointer, ctypes.c_int32(token), _at(logits))
        return logits

    def tokens(self, state: CState, ids: ArrayLike, last: int = 1) -> NDArray[np.float32]:
        """Read tokens. Returns the logits after the ``last`` of them, float32 [last, V].

        Raises:
            TypeError: if ``ids`` or ``last`` are not integers.
            ValueError: if ``ids`` is not [T], an id is not in the vocabulary, there are fewer than ``last`` of them, or
                the state is of another model.
        """
        pointer, ids = self._pointer(state), self._ids(ids)
        last = operator.index(last)
        if not 0 <= last <= len(ids):
            raise ValueError(f"last is {last}; it must be in 0..{len(ids)}, the number of ids")
        logits = np.empty((last, self.vocabulary), np.float32)
        self.call("tokens", self._model, pointer, _at(ids), len(ids), _at(logits), last)
        return logits

    def step(self, states: Sequence[CState], ids: ArrayLike) -> NDArray[np.float32]:
        """Read one token of each of several sequences. Returns the logits, float32 [B, V].

        Raises ValueError if there is not one id for each state, and as ``tokens`` does.
        """
        pointers, ids = [self._pointer(state).value for state in states], self._ids(ids)
        if len(ids) != len(pointers):
            raise ValueError(f"there are {len(ids)} ids and {len(pointers)} states; each state reads one id")
        logits = np.empty((len(ids), self.vocabulary), np.float32)
        held = (ctypes.c_void_p * len(ids))(*pointers)
        self.call("step", self._model, held, _at(ids), len(ids), _at(logits))
        return logits

    def _pointer(self, state: CState) -> ctypes.c_void_p:
        if not isinstance(state, CState) or state._of is not self:
            raise ValueError("the state is of another model; states go from one to another through files")
        return state.pointer

    def _ids(self, ids: ArrayLike) -> NDArray[np.int32]:
        """Return ids [T] as the library takes them, to which a conversion would cut any number without a word."""
        found = np.asarray(ids)
        if found.ndim != 1:
            raise ValueError(f"ids has shape {list(found.shape)}; it must be [T]")
        if found.size and found.dtype.kind not in "iu":
            raise TypeError(f"ids is {found.dtype}; it must be integers")
        for i in np.flatnonzero((found < 0) | (found >= self.vocabulary))[:1] if found.size else ():
            raise ValueError(f"id {i} is {found[i]}; it must be in 0..{self.vocabulary - 1}")
        return np.ascontiguousarray(found, np.int32)

    def call(self, name: str, *arguments: Any) -> None:
        """Call ``ramnet_<name>``, which raises what its status stands for in ramnet.h."""
        status = getattr(self._c, f"ramnet_{name}")(*arguments)
        if status:
            message = self._c.ramnet_message().decode(errors="replace")
            raise {-1: ValueError, -2: ValueError, -5: OSError}.get(status, RuntimeError)(message)


class CState:
    """The state of one sequence."""

    def __init__(self, model: CModel) -> None:
        self._of, self.pointer = model, ctypes.c_void_p()
        model.call("state_create", model._model, ctypes.byref(self.pointer))

    def __del__(self) -> None:
        self._of._c.ramnet_state_free(self.pointer)

    @property
    def position(self) -> int:
        """The number of tokens read."""
        return int(self._of._c.ramnet_state_position(self.pointer))

    def reset(self) -> None:
        """Forget all tokens."""
        self._of._c.ramnet_state_reset(self.pointer)

    def clone(self) -> CState:
        """Return a copy that shares no memory with this state."""
        made = object.__new__(CState)
        made._of, made.pointer = self._of, ctypes.c_void_p()
        self._of.call("state_clone", self.pointer, ctypes.byref(made.pointer))
        return made

    def save(self, path: str | Path) -> None:
        """Write the state to a file that every runtime reads, ``RamState.load`` among them."""
        self._of.call("state_save", self.pointer, os.fsencode(path))

    def load(self, path: str | Path) -> None:
        """Read a state file. Raises ValueError, and changes nothing, if it is damaged or of another model."""
        self._of.call("state_load", self.pointer, os.fsencode(path))


def _load(library: Path) -> ctypes.CDLL:
    with new_path(library) as path:
        try:
            loaded = ctypes.CDLL(path)
        except OSError as error:
            raise OSError(
                f"{library} cannot be loaded on this machine, {platform.machine()}; it may be compiled for another"
                f" ({error})"
            ) from None
    try:
        loaded.ramnet_message.restype = ctypes.c_char_p
        loaded.ramnet_state_position.restype = ctypes.c_int64
    except AttributeError:
        raise ValueError(f"{library} is not the library of an exported model") from None
    return loaded


def _at(array: NDArray[Any]) -> ctypes.c_void_p:
    return ctypes.c_void_p(array.ctypes.data)
