"""Runs one graph of an export in onnxruntime."""

from __future__ import annotations

import threading
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from export.library_path import new_path
from export.onnx.ports import PAST, PRESENT, Port
from export.onnx.state import POSITION, OnnxState

if TYPE_CHECKING:
    from onnxruntime import IOBinding, NodeArg

_DTYPES = {"tensor(float)": "float32", "tensor(int64)": "int64", "tensor(int32)": "int32"}


class OnnxGraph:
    """A graph loaded on the CPU. Errors of onnxruntime are raised again as one sentence that names the file.

    onnxruntime maps the weights into memory: overwriting the file in place, rather than replacing it, changes the
    results of a loaded graph or crashes the process.

    Args:
        path: the .onnx or .ort file; the weights of an .onnx file must be in the same folder.
        threads: the number of onnxruntime's threads, at least 1; None leaves it to onnxruntime.
        library: custom operators, whose code is run.
        spinning: whether idle threads look for work before they sleep.

    Raises:
        ValueError: if ``threads`` is below 1, or onnxruntime cannot load the file.
    """

    def __init__(
        self, path: Path, threads: int | None = None, library: Path | None = None, spinning: bool = True
    ) -> None:
        import onnxruntime

        if threads is not None and threads < 1:
            raise ValueError(f"threads is {threads}; it must be at least 1, or None")
        try:
            str(path).encode()
        except UnicodeEncodeError:
            raise ValueError(f"{path} has a name that is not UTF-8, which onnxruntime cannot open; rename it") from None
        self.path = path
        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = threads or 0
        options.add_session_config_entry("session.intra_op.allow_spinning", str(int(spinning)))
        options.log_severity_level = 4  # errors are raised, too, and need not be logged
        if library is not None:
            with _one_sentence(ValueError, f"{library} cannot be loaded by onnxruntime"), new_path(library) as new:
                options.register_custom_ops_library(new)
        with _one_sentence(ValueError, f"{path} cannot be loaded by onnxruntime"):
            # The fallback would print a message and try the same provider again.
            self._session = onnxruntime.InferenceSession(
                str(path), options, providers=["CPUExecutionProvider"], enable_fallback=0
            )

    @property
    def inputs(self) -> list[Port]:
        """The inputs of the graph in the file."""
        return _ports(self._session.get_inputs())

    @property
    def outputs(self) -> list[Port]:
        """The outputs of the graph in the file."""
        return _ports(self._session.get_outputs())

    def run(self, outputs: list[str], feeds: dict[str, NDArray[Any]]) -> list[NDArray[Any]]:
        """Compute the named outputs. Raises RuntimeError if onnxruntime fails, for example for lack of memory."""
        with _one_sentence(RuntimeError, f"{self.path} failed in onnxruntime"):
            # onnxruntime may return a scalar as a Python number.
            return [np.asarray(x) for x in self._session.run(outputs, feeds)]

    def binding(self) -> IOBinding:
        """Return a new binding of inputs and outputs to buffers, for ``run_bound``."""
        return self._session.io_binding()

    def run_bound(self, binding: IOBinding) -> None:
        """Run on the buffers of ``binding``; raises as ``run`` does."""
        with _one_sentence(RuntimeError, f"{self.path} failed in onnxruntime"):
            self._session.run_with_iobinding(binding)


class BoundStep:
    """The decode graph bound to the arrays of one state, which it updates in place. Calls are serialised by a lock."""

    def __init__(self, graph: OnnxGraph, state: OnnxState, batch: int, vocab_size: int) -> None:
        from onnxruntime import OrtValue

        self._graph = graph
        self._lock = threading.Lock()
        self._arrays = arrays = dict(state.tensors)  # a binding holds no references to its buffers
        self._ids = np.zeros((batch, 1), dtype=np.int64)
        self._logits = np.zeros((batch, 1, vocab_size), dtype=np.float32)
        self._next_position = np.zeros_like(arrays[POSITION])
        self._binding = graph.binding()
        bind_in, bind_out = self._binding.bind_ortvalue_input, self._binding.bind_ortvalue_output
        bind_in("input_ids", OrtValue.ortvalue_from_numpy(self._ids))
        bind_out("logits", OrtValue.ortvalue_from_numpy(self._logits))
        for name, array in arrays.items():
            past = OrtValue.ortvalue_from_numpy(array)  # shares the array's memory
            # Every layer reads the position, so the next position is written to a separate buffer.
            present = OrtValue.ortvalue_from_numpy(self._next_position) if name == POSITION else past
            bind_in(PAST + name, past)
            bind_out(PRESENT + name, present)

    def __call__(self, input_ids: NDArray[np.int64]) -> NDArray[np.float32]:
        """Return logits [B, 1, V] of ids [B, 1], updating the arrays."""
        if input_ids.shape != self._ids.shape:
            raise ValueError(f"input_ids has {len(input_ids)} rows; the state is of batch size {len(self._ids)}")
        with self._lock:
            self._ids[:] = input_ids
            try:
                self._graph.run_bound(self._binding)
            except RuntimeError as error:
                # Some arrays are of the next token already. A copy of all of them before each would cost O(M) a token.
                self._arrays[POSITION][...] = -1
                raise RuntimeError(f"{error}; the state is updated in part and not taken from here on") from None
            self._arrays[POSITION][...] = self._next_position
            return self._logits.copy()


def _ports(values: Iterable[NodeArg]) -> list[Port]:
    return [
        Port(name=x.name, shape=[size if isinstance(size, int) else str(size) for size in x.shape],
             dtype=_DTYPES.get(x.type, x.type))
        for x in values
    ]  # fmt: skip


@contextmanager
def _one_sentence(kind: type[Exception], problem: str) -> Iterator[None]:
    """Raise errors of onnxruntime again as ``kind``, with ``problem`` and their message in one line."""
    try:
        yield
    except _errors() as error:
        raise kind(f"{problem}: {' '.join(str(error).split())}") from None


@cache
def _errors() -> tuple[type[Exception], ...]:
    """Return the exceptions that onnxruntime raises: its own, whose only base class is Exception, and pybind11's."""
    from onnxruntime.capi import onnxruntime_pybind11_state as bindings

    own = (x for x in vars(bindings).values() if isinstance(x, type) and issubclass(x, Exception))
    return (*own, RuntimeError)
