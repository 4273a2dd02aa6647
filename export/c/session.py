"""Runs an exported C library from Python, without PyTorch."""

from __future__ import annotations

import ctypes
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

from export.folder import DESCRIPTION
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
        ValueError: if a file is missing or damaged, the weights are of another model, or ``threads`` is below 1.
    """

    def __init__(self, library: str | Path, weights: str | Path, threads: int = 1) -> None:
        self._model = ctypes.c_void_p()
        library = Path(library)
        if library.with_name(DESCRIPTION).is_file():
            Manifest.load(library.parent)
        self._c = ctypes.CDLL(str(library.resolve()))
        self._c.ramnet_message.restype = ctypes.c_char_p
        self._c.ramnet_state_position.restype = ctypes.c_int64
        self.vocabulary = int(self._c.ramnet_vocabulary())
        self.call("open", str(weights).encode(), threads, ctypes.byref(self._model))

    def __del__(self) -> None:
        if self._model:
            self._c.ramnet_close(self._model)

    def state(self) -> CState:
        """Return a state before the first token."""
        return CState(self)

    def token(self, state: CState, token: int) -> NDArray[np.float32]:
        """Read one token. Returns the logits, float32 [V]."""
        logits = np.empty(self.vocabulary, np.float32)
        self.call("token", self._model, state.pointer, ctypes.c_int32(token), _at(logits))
        return logits

    def tokens(self, state: CState, ids: ArrayLike, last: int = 1) -> NDArray[np.float32]:
        """Read tokens. Returns the logits after the ``last`` of them, float32 [last, V]."""
        ids = np.ascontiguousarray(ids, np.int32)
        logits = np.empty((last, self.vocabulary), np.float32)
        self.call("tokens", self._model, state.pointer, _at(ids), ids.size, _at(logits), last)
        return logits

    def step(self, states: list[CState], ids: ArrayLike) -> NDArray[np.float32]:
        """Read one token of each of several sequences. Returns the logits, float32 [B, V]."""
        ids = np.ascontiguousarray(ids, np.int32)
        logits = np.empty((len(states), self.vocabulary), np.float32)
        held = (ctypes.c_void_p * len(states))(*(state.pointer.value for state in states))
        self.call("step", self._model, held, _at(ids), len(states), _at(logits))
        return logits

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
        self._of.call("state_save", self.pointer, str(path).encode())

    def load(self, path: str | Path) -> None:
        """Read a state file. Raises ValueError, and changes nothing, if it is damaged or of another model."""
        self._of.call("state_load", self.pointer, str(path).encode())


def _at(array: NDArray[Any]) -> ctypes.c_void_p:
    return ctypes.c_void_p(array.ctypes.data)
