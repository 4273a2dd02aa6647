"""One graph of an export in onnxruntime."""

from __future__ import annotations

import threading
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from numpy.typing import NDArray

from export.graphs import PAST, PRESENT
from export.ports import Port
from export.state import POSITION, OnnxState

if TYPE_CHECKING:
    from onnxruntime import IOBinding, NodeArg

_DTYPES = {"tensor(float)": "float32", "tensor(int64)": "int64", "tensor(int32)": "int32"}


class OnnxGraph:
    """A graph loaded on the CPU; onnxruntime's own errors come out as one sentence that names the file.

    onnxruntime maps the weights rather than read them: a file that is overwritten in place, and not replaced by
    another, changes the numbers of a loaded graph or ends the process.

    Args:
        path: of an .onnx file; its weights must lie in the same folder, or onnxruntime refuses them.
        threads: of onnxruntime, at least 1; None takes ``torch.get_num_threads()``.

    Raises:
        ValueError: where onnxruntime cannot load the file.
    """

    def __init__(self, path: Path, threads: int | None = None) -> None:
        import onnxruntime

        if threads is not None and threads < 1:
            raise ValueError(f"threads is {threads}; it must be at least 1, or None")
        try:
            str(path).encode()
        except UnicodeEncodeError:
            raise ValueError(f"{path} has a name that is not UTF-8, which onnxruntime cannot open; rename it") from None
        self.path = path
        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = threads or torch.get_num_threads()
        options.log_severity_level = 4  # what it would log as an error it raises too
        with _one_sentence(ValueError, f"{path} cannot be loaded by onnxruntime"):
            # The fallback would print, and try the same once more.
            self._session = onnxruntime.InferenceSession(
                str(path), options, providers=["CPUExecutionProvider"], enable_fallback=0
            )

    @property
    def inputs(self) -> list[Port]:
        """What the file has as inputs."""
        return _ports(self._session.get_inputs())

    @property
    def outputs(self) -> list[Port]:
        """What the file has as outputs."""
        return _ports(self._session.get_outputs())

    def run(self, outputs: list[str], feeds: dict[str, NDArray[Any]]) -> list[NDArray[Any]]:
        """The named outputs; RuntimeError where onnxruntime fails, out of memory for one."""
        with _one_sentence(RuntimeError, f"{self.path} failed in onnxruntime"):
            # A scalar may come back as a plain number.
            return [np.asarray(x) for x in self._session.run(outputs, feeds)]

    def binding(self) -> IOBinding:
        """For ``run_bound``: buffers to read and to write."""
        return self._session.io_binding()

    def run_bound(self, binding: IOBinding) -> None:
        """Run on the buffers of ``binding``; errors as in ``run``."""
        with _one_sentence(RuntimeError, f"{self.path} failed in onnxruntime"):
            self._session.run_with_iobinding(binding)


class BoundStep:
    """The decode graph on the arrays of one state, bound once, as they are the same at every step.

    Any number of threads may call it, one after another.
    """

    def __init__(self, graph: OnnxGraph, state: OnnxState, batch: int, vocab_size: int) -> None:
        from onnxruntime import OrtValue

        self._graph = graph
        self._lock = threading.Lock()
        self._arrays = arrays = dict(state.tensors)  # a binding does not keep its buffers alive
        self._ids = np.zeros((batch, 1), dtype=np.int64)
        self._logits = np.zeros((batch, 1, vocab_size), dtype=np.float32)
        self._next_position = np.zeros_like(arrays[POSITION])
        self._binding = graph.binding()
        bind_in, bind_out = self._binding.bind_ortvalue_input, self._binding.bind_ortvalue_output
        bind_in("input_ids", OrtValue.ortvalue_from_numpy(self._ids))
        bind_out("logits", OrtValue.ortvalue_from_numpy(self._logits))
        for name, array in arrays.items():
            past = OrtValue.ortvalue_from_numpy(array)  # shares the array's memory
            # Every layer reads the position, so the next one must not replace it during the run.
            present = OrtValue.ortvalue_from_numpy(self._next_position) if name == POSITION else past
            bind_in(PAST + name, past)
            bind_out(PRESENT + name, present)

    def __call__(self, input_ids: NDArray[np.int64]) -> NDArray[np.float32]:
        """Logits [B, 1, V] of ids [B, 1]; the arrays are updated."""
        if input_ids.shape != self._ids.shape:
            raise ValueError(f"input_ids has {len(input_ids)} rows; the state is of batch size {len(self._ids)}")
        with self._lock:
            self._ids[:] = input_ids
            self._graph.run_bound(self._binding)
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
    """Raise what onnxruntime raises as ``kind``: ``problem``, and its words in one line."""
    try:
        yield
    except _errors() as error:
        raise kind(f"{problem}: {' '.join(str(error).split())}") from None


@cache
def _errors() -> tuple[type[Exception], ...]:
    """What onnxruntime raises: its own exceptions, which have no base but Exception, and pybind11's."""
    from onnxruntime.capi import onnxruntime_pybind11_state as bindings

    own = (x for x in vars(bindings).values() if isinstance(x, type) and issubclass(x, Exception))
    return (*own, RuntimeError)
