"""Running an export through onnxruntime."""

from __future__ import annotations

from pathlib import Path
from typing import NamedTuple
from weakref import WeakKeyDictionary

import torch
from torch import Tensor

from export.graphs import GRAPHS, PAST, PRESENT, SLOTS, WEIGHTS
from export.libraries import need
from export.ports import difference, inputs
from export.runtime import BoundStep, OnnxGraph
from export.sidecar import FILENAME, Sidecar
from export.state import POSITION, OnnxState
from ramnet.generation import generate
from ramnet.ids import check_prompt


class OnnxOutput(NamedTuple):
    """logits [B, T, V] and the state after the last token."""

    logits: Tensor
    state: OnnxState


class OnnxSession:
    """An exported model: called as ``RamNetForCausalLM`` is, with an ``OnnxState`` for its state.

    Threads may share a session, each with states of its own.

    Args:
        directory: what ``ramnet export`` wrote. While the session lives, its files may be removed or replaced by
            others, as a new export does, but not overwritten in place: onnxruntime maps the weights, it does not read
            them.
        threads: of onnxruntime, at least 1; None takes ``torch.get_num_threads()``.

    Raises:
        ValueError: for a directory that is no export, or one whose files are damaged.
        ImportError: without onnxruntime.
    """

    def __init__(self, directory: str | Path, threads: int | None = None) -> None:
        need("onnxruntime")
        directory = Path(directory)
        self.sidecar = Sidecar.load(directory)
        self.config = self.sidecar.config
        self.graphs = {kind: OnnxGraph(directory / f"{kind}.onnx", threads) for kind in GRAPHS}
        for kind, graph in self.graphs.items():
            if wrong := difference(self.config, kind, graph.inputs, graph.outputs):
                raise ValueError(f"{graph.path} is not the graph of {FILENAME} beside it: it {wrong}")
        self._weight_bytes = (directory / WEIGHTS).stat().st_size
        self._steps: WeakKeyDictionary[OnnxState, BoundStep] = WeakKeyDictionary()

    def __call__(self, input_ids: Tensor, state: OnnxState | None = None, *, in_place: bool = False) -> OnnxOutput:
        """Logits of every token and the state after the last; as ``RamNetForCausalLM.forward``."""
        tokens = self._check(input_ids)
        state = OnnxState.zeros(self.config, len(input_ids)) if state is None else state
        if in_place:
            return OnnxOutput(self.step(input_ids, state), state)
        # Scan copies the state at every token, where a step reads the weights. Measured at 2 layers of width 128, one
        # thread: at M = 256, with twice the state as large as the weights, they are even; at 4096 steps take half.
        copied = 2 * sum(array.nbytes for array in state.tensors.values())
        if tokens > 0 and copied < self._weight_bytes:
            return self.prefill(input_ids, state)
        state = state.clone()
        logits = [self.step(token, state) for token in input_ids.split(1, dim=1) if tokens]
        nothing = torch.empty(len(input_ids), 0, self.config.vocab_size, dtype=torch.float32)
        return OnnxOutput(torch.cat([nothing, *logits], dim=1), state)

    def prefill(self, input_ids: Tensor, state: OnnxState | None = None) -> OnnxOutput:
        """Logits [B, T, V] of ``input_ids`` int64 [B, T], T ≥ 1, and a new state, by the prefill graph."""
        if self._check(input_ids) < 1:
            raise ValueError(f"input_ids has shape {list(input_ids.shape)}; prefill needs [B, T] with T >= 1")
        state = OnnxState.zeros(self.config, len(input_ids)) if state is None else state
        self._check_state(state, len(input_ids))
        return run_copying(self.graphs["prefill"], input_ids, state)[0]

    def step(self, input_ids: Tensor, state: OnnxState) -> Tensor:
        """Logits [B, 1, V] of one token ``input_ids`` int64 [B, 1]; updates ``state`` in place.

        Each array of the state is bound as past and present at once, so that onnxruntime writes K rows of it and
        copies none: the time does not depend on M.
        """
        tokens = self._check(input_ids)
        if tokens != 1:
            raise ValueError(f"in_place takes one token at a time, not {tokens}")
        step = self._steps.get(state)
        if step is None:
            self._check_state(state, len(input_ids))
            step = BoundStep(self.graphs["decode"], state, len(input_ids), self.config.vocab_size)
            step = self._steps.setdefault(state, step)  # that of another thread where there is one
        _check_position(state)
        return torch.from_numpy(step(input_ids.numpy()))

    generate = generate

    def _check(self, input_ids: Tensor) -> int:
        """How many tokens there are; ValueError for ids that are none."""
        if input_ids.dim() != 2 or input_ids.dtype != torch.int64:
            raise ValueError(f"input_ids is {input_ids.dtype} {list(input_ids.shape)}; it must be int64 [B, T]")
        if input_ids.numel():
            check_prompt(input_ids, self.config.vocab_size)
        return input_ids.shape[1]

    def _check_state(self, state: OnnxState, batch: int) -> None:
        """ValueError where ``state`` is of another model or batch size."""
        found = {name: list(array.shape) for name, array in state.tensors.items()}
        for port in inputs(self.config, "decode"):
            if port.name.startswith(PAST):
                name, shape = port.name.removeprefix(PAST), [batch if size == "batch" else size for size in port.shape]
                if found.get(name) != shape:
                    raise ValueError(f"state {name} has shape {found.get(name)}; here it must be {shape}")
                del found[name]
        if found:
            raise ValueError(f"state holds {', '.join(found)} too, of which this model has no use")
        _check_position(state)


def _check_position(state: OnnxState) -> None:
    """ValueError where a row of ``state`` stands before the first token."""
    position = state.tensors[POSITION]
    if position.size and (lowest := int(position.min())) < 0:
        raise ValueError(f"state position holds {lowest}; it must be >= 0")


def run_copying(
    graph: OnnxGraph, input_ids: Tensor, state: OnnxState, layers: int = 0
) -> tuple[OnnxOutput, list[Tensor]]:
    """Output of either graph by a plain run, which copies the state, and the slots of the first ``layers`` layers."""
    feeds = {"input_ids": input_ids.numpy()} | {PAST + name: array for name, array in state.tensors.items()}
    present = [PRESENT + name for name in state.tensors]
    logits, *rest = graph.run(["logits", *present, *(f"{SLOTS}{i}" for i in range(layers))], feeds)
    after = OnnxState(dict(zip(state.tensors, rest, strict=False)))
    return OnnxOutput(torch.from_numpy(logits), after), [torch.from_numpy(x) for x in rest[len(present) :]]
