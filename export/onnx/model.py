"""Runs an exported model in onnxruntime on NumPy arrays, without PyTorch."""

from __future__ import annotations

from pathlib import Path
from typing import Any
from weakref import WeakKeyDictionary

import numpy as np
from numpy.typing import NDArray

from export.folder import DESCRIPTION
from export.libraries import need
from export.onnx.ports import GRAPHS, PAST, PRESENT, SLOTS, WEIGHTS, difference, inputs
from export.onnx.runtime import BoundStep, OnnxGraph
from export.onnx.sidecar import LIBRARY, Sidecar
from export.onnx.state import POSITION, OnnxState
from schedules.deployment import OnnxDeployment


class OnnxModel:
    """An exported model. Threads may share it if each uses its own states.

    Args:
        directory: the folder that ``ramnet export`` wrote. While the model exists, its files may be removed or
            replaced, as by another export, but not overwritten in place, because onnxruntime maps the weights. An
            export with kernels holds a library, whose code is run: load it only if you trust where it comes from.
        threads: the number of onnxruntime's threads, at least 1. By default it is that of ``deployment`` or, for an
            export that was not tuned, ``untuned_threads``.
        deployment: how onnxruntime runs the graphs; by default what the export was tuned to.
        untuned_threads: None leaves the number to onnxruntime.

    Raises:
        ValueError: if ``directory`` is not an export, or a file is damaged.
        ImportError: if onnxruntime is not installed.
    """

    def __init__(
        self, directory: str | Path, threads: int | None = None, *, deployment: OnnxDeployment | None = None,
        untuned_threads: int | None = None,
    ) -> None:  # fmt: skip
        need("onnxruntime")
        directory = Path(directory)
        self.sidecar = Sidecar.load(directory)
        self.config = self.sidecar.config
        library = directory / LIBRARY if self.sidecar.kernels else None  # its digest is right: ``Sidecar.load``
        tuned = deployment or self.sidecar.deployment
        per_graph = {"decode": tuned.threads, "prefill": tuned.prompt_threads} if tuned else {}
        self.graphs = {}
        for kind in GRAPHS:
            count = per_graph.get(kind, untuned_threads) if threads is None else threads
            spinning = tuned is None or tuned.spinning
            self.graphs[kind] = OnnxGraph(directory / f"{kind}.onnx", count, library, spinning)
        for kind, graph in self.graphs.items():
            if wrong := difference(self.config, kind, graph.inputs, graph.outputs):
                raise ValueError(f"{graph.path} is not the graph of {DESCRIPTION} beside it: it {wrong}")
        self._weight_bytes = (directory / WEIGHTS).stat().st_size
        self._steps: WeakKeyDictionary[OnnxState, BoundStep] = WeakKeyDictionary()

    def state(self, batch_size: int = 1) -> OnnxState:
        """Return the state before the first token."""
        return OnnxState.zeros(self.config, batch_size)

    def read(
        self, input_ids: NDArray[np.int64], state: OnnxState | None = None
    ) -> tuple[NDArray[np.float32], OnnxState]:
        """Return logits [B, T, V] of ids [B, T] after ``state``, and a new state, from the graph that is faster."""
        tokens = self.check(input_ids)
        state = self.state(len(input_ids)) if state is None else state
        _check_type(state)
        # Per token, ONNX's Scan, which kernels replace, copies the state, and a step reads the weights. Measured with
        # 2 layers of width 128 on one thread: equal at M = 256, where twice the state is as large as the weights; at
        # M = 4096 steps take half the time.
        copied = 2 * sum(array.nbytes for array in state.tensors.values())
        if tokens > 0 and (self.sidecar.kernels or copied < self._weight_bytes):
            return self.prefill(input_ids, state)
        state = state.clone()
        logits = [self.step(input_ids[:, t : t + 1], state) for t in range(tokens)]
        nothing = np.empty((len(input_ids), 0, self.config.vocab_size), np.float32)
        return np.concatenate([nothing, *logits], axis=1), state

    def prefill(
        self, input_ids: NDArray[np.int64], state: OnnxState | None = None
    ) -> tuple[NDArray[np.float32], OnnxState]:
        """Return logits [B, T, V] of ids [B, T], T ≥ 1, after ``state``, and a new state."""
        if self.check(input_ids) < 1:
            raise ValueError(f"input_ids has shape {list(input_ids.shape)}; prefill needs [B, T] with T >= 1")
        state = self.state(len(input_ids)) if state is None else state
        self._check_state(state, len(input_ids))
        logits, after, _ = run(self.graphs["prefill"], input_ids, state)
        return logits, after

    def step(self, input_ids: NDArray[np.int64], state: OnnxState) -> NDArray[np.float32]:
        """Return logits [B, 1, V] of one token, ids [B, 1], updating ``state`` in place.

        Each array of the state is bound as both input and output, so that onnxruntime writes only K of its rows and
        does not copy it. The time does not depend on M.

        Raises RuntimeError if onnxruntime fails. ``state``, which may be updated in part, is refused from then on: its
        position is −1.
        """
        tokens = self.check(input_ids)
        if tokens != 1:
            raise ValueError(f"in_place takes one token at a time, not {tokens}")
        _check_type(state)
        step = self._steps.get(state)
        if step is None:
            self._check_state(state, len(input_ids))
            step = BoundStep(self.graphs["decode"], state, len(input_ids), self.config.vocab_size)
            step = self._steps.setdefault(state, step)  # another thread may have added one
        _check_position(state)
        return step(input_ids)

    def check(self, input_ids: NDArray[Any]) -> int:
        """Return the number of tokens T. Raises ValueError if ``input_ids`` is not int64 [B, T] or out of range."""
        if input_ids.ndim != 2 or input_ids.dtype != np.int64:
            raise ValueError(f"input_ids is {input_ids.dtype} {list(input_ids.shape)}; it must be int64 [B, T]")
        vocabulary = self.config.vocab_size
        wrong = input_ids[(input_ids < 0) | (input_ids >= vocabulary)]
        if wrong.size:
            raise ValueError(f"input_ids holds {wrong[0]}; token ids must be in 0..{vocabulary - 1}")
        return int(input_ids.shape[1])

    def _check_state(self, state: OnnxState, batch: int) -> None:
        """Raise ValueError if ``state`` does not fit the model or the batch size."""
        _check_type(state)
        found = {name: list(array.shape) for name, array in state.tensors.items()}
        for port in inputs(self.config, "decode"):
            if port.name.startswith(PAST):
                name, shape = port.name.removeprefix(PAST), [batch if size == "batch" else size for size in port.shape]
                if found.get(name) != shape:
                    raise ValueError(f"state {name} has shape {found.get(name)}; here it must be {shape}")
                del found[name]
        if found:
            raise ValueError(f"state holds {', '.join(found)}, which this model does not have")
        _check_position(state)


def _check_type(state: object) -> None:
    if not isinstance(state, OnnxState):
        raise TypeError(f"state is a {type(state).__name__}; it must be an OnnxState, which OnnxState.of makes of one")


def _check_position(state: OnnxState) -> None:
    """Raise ValueError if a position is negative or larger than ``RamState`` may have."""
    position = state.tensors[POSITION]
    for at in (int(position.min()), int(position.max())) if position.size else ():
        if not 0 <= at <= 2**62:
            raise ValueError(f"state position holds {at}; it must be in 0..2^62")


def run(
    graph: OnnxGraph, input_ids: NDArray[np.int64], state: OnnxState, layers: int = 0
) -> tuple[NDArray[np.float32], OnnxState, list[NDArray[np.int32]]]:
    """Run a graph with a copy of the state. Returns logits, the next state, and the slots of the first ``layers``
    layers."""
    feeds = {"input_ids": input_ids} | {PAST + name: array for name, array in state.tensors.items()}
    present = [PRESENT + name for name in state.tensors]
    logits, *rest = graph.run(["logits", *present, *(f"{SLOTS}{i}" for i in range(layers))], feeds)
    return logits, OnnxState(dict(zip(state.tensors, rest, strict=False))), rest[len(present) :]
