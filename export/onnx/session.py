"""Runs an exported model in onnxruntime as PyTorch's model is run."""

from __future__ import annotations

from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

from export.onnx import model
from export.onnx.ports import WEIGHTS
from export.onnx.runtime import OnnxGraph
from export.onnx.state import OnnxState
from ramnet.generation import generate


class OnnxOutput(NamedTuple):
    """Output of ``OnnxSession``: logits [B, T, V] and the state after the last token."""

    logits: Tensor
    state: OnnxState


class OnnxSession:
    """An exported model, called like ``RamNetForCausalLM`` but with an ``OnnxState``.

    It takes and raises what ``OnnxModel`` does, but ``threads=None`` uses ``torch.get_num_threads()``.
    """

    def __init__(self, directory: str | Path, threads: int | None = None) -> None:
        self.model = model.OnnxModel(directory, torch.get_num_threads() if threads is None else threads)
        self.sidecar, self.config, self.graphs = self.model.sidecar, self.model.config, self.model.graphs
        self._weight_bytes = (Path(directory) / WEIGHTS).stat().st_size

    def __call__(self, input_ids: Tensor, state: OnnxState | None = None, *, in_place: bool = False) -> OnnxOutput:
        """Return logits [B, T, V] of ids [B, T] and the state after them, as ``RamNetForCausalLM.forward`` does."""
        tokens = self.model.check(input_ids.numpy())
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
        logits, after = self.model.prefill(input_ids.numpy(), state)
        return OnnxOutput(torch.from_numpy(logits), after)

    def step(self, input_ids: Tensor, state: OnnxState) -> Tensor:
        """Return logits [B, 1, V] of one token, ``input_ids`` int64 [B, 1], updating ``state`` in place, as
        ``OnnxModel.step`` does."""
        return torch.from_numpy(self.model.step(input_ids.numpy(), state))

    generate = generate


def run_copying(
    graph: OnnxGraph, input_ids: Tensor, state: OnnxState, layers: int = 0
) -> tuple[OnnxOutput, list[Tensor]]:
    """Run a graph with a copy of the state. Returns its output and the slots of the first ``layers`` layers."""
    logits, after, slots = model.run(graph, input_ids.numpy(), state, layers)
    return OnnxOutput(torch.from_numpy(logits), after), [torch.from_numpy(x) for x in slots]
