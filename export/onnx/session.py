"""Runs an exported model in onnxruntime as PyTorch's model is run."""

from __future__ import annotations

from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from export.onnx import model
from export.onnx.runtime import OnnxGraph
from export.onnx.state import OnnxState
from ramnet.generation import generate
from ramnet.ids import check_type


class OnnxOutput(NamedTuple):
    """Output of ``OnnxSession``: logits [B, T, V] and the state after the last token."""

    logits: Tensor
    state: OnnxState


class OnnxSession:
    """An exported model, called like ``RamNetForCausalLM`` but with an ``OnnxState``.

    It takes and raises what ``OnnxModel`` does, but an export that was not tuned runs on ``torch.get_num_threads()``.
    """

    def __init__(self, directory: str | Path, threads: int | None = None) -> None:
        self.model = model.OnnxModel(directory, threads, untuned_threads=torch.get_num_threads())
        self.sidecar, self.config, self.graphs = self.model.sidecar, self.model.config, self.model.graphs

    def __call__(self, input_ids: Tensor, state: OnnxState | None = None, *, in_place: bool = False) -> OnnxOutput:
        """Return logits [B, T, V] of ids [B, T] and the state after them, as ``RamNetForCausalLM.forward`` does."""
        if in_place:
            check_type(input_ids)
            state = OnnxState.zeros(self.config, len(input_ids)) if state is None else state
            return OnnxOutput(self.step(input_ids, state), state)
        logits, after = self.model.read(_array(input_ids), state)
        return OnnxOutput(torch.from_numpy(logits), after)

    def prefill(self, input_ids: Tensor, state: OnnxState | None = None) -> OnnxOutput:
        """Run the prefill graph: logits [B, T, V] of ``input_ids`` int64 [B, T], T ≥ 1, and a new state."""
        logits, after = self.model.prefill(_array(input_ids), state)
        return OnnxOutput(torch.from_numpy(logits), after)

    def step(self, input_ids: Tensor, state: OnnxState) -> Tensor:
        """Return logits [B, 1, V] of one token, ``input_ids`` int64 [B, 1], updating ``state`` in place, as
        ``OnnxModel.step`` does."""
        return torch.from_numpy(self.model.step(_array(input_ids), state))

    generate = generate


def _array(input_ids: Tensor) -> NDArray[np.int64]:
    """Return ids as an array of int64. Raises TypeError if they are not a tensor of integers."""
    check_type(input_ids)
    return input_ids.long().numpy()


def run_copying(
    graph: OnnxGraph, input_ids: Tensor, state: OnnxState, layers: int = 0
) -> tuple[OnnxOutput, list[Tensor]]:
    """Run a graph with a copy of the state. Returns its output and the slots of the first ``layers`` layers."""
    logits, after, slots = model.run(graph, _array(input_ids), state, layers)
    return OnnxOutput(torch.from_numpy(logits), after), [torch.from_numpy(x) for x in slots]
