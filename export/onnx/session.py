"""Runs an exported model in onnxruntime."""

from __future__ import annotations

from pathlib import Path
from typing import NamedTuple
from weakref import WeakKeyDictionary

import torch
from torch import Tensor

from export.folder import DESCRIPTION
from export.libraries import need
from export.onnx.graphs import GRAPHS, PAST, PRESENT, SLOTS, WEIGHTS
from export.onnx.ports import difference, inputs
from export.onnx.runtime import BoundStep, OnnxGraph
from export.onnx.sidecar import LIBRARY, Sidecar
from export.onnx.state import POSITION, OnnxState
from ramnet.generation import generate
from ramnet.ids import check_prompt


class OnnxOutput(NamedTuple):
    """Output of ``OnnxSession``: logits [B, T, V] and the state after the last token."""

    logits: Tensor
    state: OnnxState


class OnnxSession:
    """An exported model, called like ``RamNetForCausalLM`` but with an ``OnnxState``.

    Threads may share a session if each uses its own states.

    Args:
        directory: the folder that ``ramnet export`` wrote. While the session exists, its files may be removed or
            replaced, as by another export, but not overwritten in place, because onnxruntime maps the weights. An
            export with kernels holds a library, whose code is run: load it only if you trust where it comes from.
        threads: the number of onnxruntime's threads, at least 1; None uses ``torch.get_num_threads()``.

    Raises:
        ValueError: if ``directory`` is not an export, or a file is damaged.
        ImportError: if onnxruntime is not installed.
    """

    def __init__(self, directory: str | Path, threads: int | None = None) -> None:
        need("onnxruntime")
        directory = Path(directory)
        self.sidecar = Sidecar.load(directory)
        self.config = self.sidecar.config
        library = directory / LIBRARY if self.sidecar.kernels else None  # its digest is right: ``Sidecar.load``
        self.graphs = {kind: OnnxGraph(directory / f"{kind}.onnx", threads, library) for kind in GRAPHS}
        for kind, graph in self.graphs.items():
            if wrong := difference(self.config, kind, graph.inputs, graph.outputs):
                raise ValueError(f"{graph.path} is not the graph of {DESCRIPTION} beside it: it {wrong}")
        self._weight_bytes = (directory / WEIGHTS).stat().st_size
        self._steps: WeakKeyDictionary[OnnxState, BoundStep] = WeakKeyDictionary()

    def __call__(self, input_ids: Tensor, state: OnnxState | None = None, *, in_place: bool = False) -> OnnxOutput:
        """Return logits [B, T, V] of ids [B, T] and the state after them, as ``RamNetForCausalLM.forward`` does."""
        tokens = self._check(input_ids)
        state = OnnxState.zeros(self.config, len(input_ids)) if state is None else state
        if in_place:
            return OnnxOutput(self.step(input_ids, state), state)
        # Per token, ONNX's Scan, which kernels replace, copies the state, and a step reads the weights. Measured with
        # 2 layers of width 128 on one thread: equal at M = 256, where twice the state is as large as the weights; at
        # M = 4096 steps take half the time.
        copied = 2 * sum(array.nbytes for array in state.tensors.values())
        if tokens > 0 and (self.sidecar.kernels or copied < self._weight_bytes):
            return self.prefill(input_ids, state)
        state = state.clone()
        logits = [self.step(token, state) for token in input_ids.split(1, dim=1) if tokens]
        nothing = torch.empty(len(input_ids), 0, self.config.vocab_size, dtype=torch.float32)
        return OnnxOutput(torch.cat([nothing, *logits], dim=1), state)

    def prefill(self, input_ids: Tensor, state: OnnxState | None = None) -> OnnxOutput:
        """Run the prefill graph: logits [B, T, V] of ``input_ids`` int64 [B, T], T ≥ 1, and a new state."""
        if self._check(input_ids) < 1:
            raise ValueError(f"input_ids has shape {list(input_ids.shape)}; prefill needs [B, T] with T >= 1")
        state = OnnxState.zeros(self.config, len(input_ids)) if state is None else state
        self._check_state(state, len(input_ids))
        return run_copying(self.graphs["prefill"], input_ids, state)[0]

    def step(self, input_ids: Tensor, state: OnnxState) -> Tensor:
        """Return logits [B, 1, V] of one token, ``input_ids`` int64 [B, 1], updating ``state`` in place.

        Each array of the state is bound as both input and output, so that onnxruntime writes only K of its rows and
        does not copy it. The time does not depend on M.

        Raises RuntimeError if onnxruntime fails. ``state``, which may be updated in part, is refused from then on: its
        position is −1.
        """
        tokens = self._check(input_ids)
        if tokens != 1:
            raise ValueError(f"in_place takes one token at a time, not {tokens}")
        step = self._steps.get(state)
        if step is None:
            self._check_state(state, len(input_ids))
            step = BoundStep(self.graphs["decode"], state, len(input_ids), self.config.vocab_size)
            step = self._steps.setdefault(state, step)  # another thread may have added one
        _check_position(state)
        return torch.from_numpy(step(input_ids.numpy()))

    generate = generate

    def _check(self, input_ids: Tensor) -> int:
        """Return the number of tokens T. Raises ValueError if ``input_ids`` is not int64 [B, T] or out of range."""
        if input_ids.dim() != 2 or input_ids.dtype != torch.int64:
            raise ValueError(f"input_ids is {input_ids.dtype} {list(input_ids.shape)}; it must be int64 [B, T]")
        if input_ids.numel():
            check_prompt(input_ids, self.config.vocab_size)
        return input_ids.shape[1]

    def _check_state(self, state: OnnxState, batch: int) -> None:
        """Raise ValueError if ``state`` does not fit the model or the batch size."""
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


def _check_position(state: OnnxState) -> None:
    """Raise ValueError if a position is negative."""
    position = state.tensors[POSITION]
    if position.size and (lowest := int(position.min())) < 0:
        raise ValueError(f"state position holds {lowest}; it must be >= 0")


def run_copying(
    graph: OnnxGraph, input_ids: Tensor, state: OnnxState, layers: int = 0
) -> tuple[OnnxOutput, list[Tensor]]:
    """Run a graph with a copy of the state. Returns its output and the slots of the first ``layers`` layers."""
    feeds = {"input_ids": input_ids.numpy()} | {PAST + name: array for name, array in state.tensors.items()}
    present = [PRESENT + name for name in state.tensors]
    logits, *rest = graph.run(["logits", *present, *(f"{SLOTS}{i}" for i in range(layers))], feeds)
    after = OnnxState(dict(zip(state.tensors, rest, strict=False)))
    return OnnxOutput(torch.from_numpy(logits), after), [torch.from_numpy(x) for x in rest[len(present) :]]
