"""Running an export through onnxruntime."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple, Self, cast

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from export.graphs import GRAPHS, PAST, PRESENT, SLOTS, WEIGHTS
from export.libraries import need
from export.sidecar import Sidecar
from ramnet import RamNetConfig, RamNetForCausalLM, RamState
from ramnet.generation import check_prompt, generate

if TYPE_CHECKING:
    from onnxruntime import InferenceSession, IOBinding


@dataclass
class OnnxState:
    """The state of ``OnnxSession``: arrays under the names of ``RamState.tensors``, updated in place by ``step``."""

    tensors: dict[str, NDArray[Any]]
    _step: _BoundStep | None = field(default=None, repr=False)

    @classmethod
    def zeros(cls, config: RamNetConfig, batch_size: int) -> Self:
        """The state before the first token."""
        return cls.of(RamState.zeros(config, batch_size))

    @classmethod
    def of(cls, state: RamState) -> Self:
        """A copy of a PyTorch state, as float32."""
        return cls(
            {
                name: np.array(x.numpy() if name == "position" else x.float().numpy())
                for name, x in state.tensors().items()
            }
        )

    def clone(self) -> Self:
        """A copy that shares nothing with this one."""
        return type(self)({name: array.copy() for name, array in self.tensors.items()})


class OnnxOutput(NamedTuple):
    """logits [B, T, V] and the state after the last token."""

    logits: Tensor
    state: OnnxState


class OnnxSession:
    """An exported model: called as ``RamNetForCausalLM`` is, with an ``OnnxState`` for its state.

    Args:
        directory: what ``ramnet export`` wrote.
        threads: of onnxruntime; None takes ``torch.get_num_threads()``.

    Raises:
        ValueError: for a directory that is no export, or one whose files are damaged.
        ImportError: without onnxruntime.
    """

    def __init__(self, directory: str | Path, threads: int | None = None) -> None:
        need("onnxruntime")
        directory = Path(directory)
        self.sidecar = Sidecar.load(directory)
        self.config = self.sidecar.config
        self.graphs = {name: load_graph(directory / f"{name}.onnx", threads) for name in GRAPHS}
        self._weight_bytes = (directory / WEIGHTS).stat().st_size

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
        return OnnxOutput(torch.cat([torch.empty(len(input_ids), 0, self.config.vocab_size), *logits], dim=1), state)

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
        if state._step is None or state._step.graph is not self.graphs["decode"]:
            self._check_state(state, len(input_ids))
            state._step = _BoundStep(self.graphs["decode"], state.tensors, len(input_ids), self.config.vocab_size)
        return torch.from_numpy(state._step(input_ids.numpy()))

    def generate(self, input_ids: Tensor, max_new_tokens: int, **sampling: Any) -> Tensor:
        """``input_ids`` [B, T] followed by what the model says; see ``ramnet.generation.generate``."""
        # That function asks of its model only what this class has: a call, and the vocabulary's size.
        return generate(cast(RamNetForCausalLM, self), input_ids, max_new_tokens, **sampling)

    def _check(self, input_ids: Tensor) -> int:
        """How many tokens there are; ValueError for ids that are none."""
        if input_ids.dim() != 2 or input_ids.dtype != torch.int64:
            raise ValueError(f"input_ids is {input_ids.dtype} {list(input_ids.shape)}; it must be int64 [B, T]")
        if input_ids.numel():
            check_prompt(input_ids, 0, self.config.vocab_size)
        return input_ids.shape[1]

    def _check_state(self, state: OnnxState, batch: int) -> None:
        """ValueError where ``state`` is of another model or batch size."""
        for port in self.sidecar.graphs["decode"].inputs:
            if port.name.startswith(PAST):
                name, shape = port.name.removeprefix(PAST), [batch if size == "batch" else size for size in port.shape]
                found = list(state.tensors[name].shape) if name in state.tensors else None
                if found != shape:
                    raise ValueError(f"state {name} has shape {found}; here it must be {shape}")


class _BoundStep:
    """The decode graph with its buffers bound once, as they are the same at every step."""

    def __init__(self, graph: InferenceSession, tensors: dict[str, NDArray[Any]], batch: int, vocab_size: int) -> None:
        from onnxruntime import OrtValue

        self.graph = graph
        self._ids = np.zeros((batch, 1), dtype=np.int64)
        self._logits = np.zeros((batch, 1, vocab_size), dtype=np.float32)
        self._position, self._next_position = tensors["position"], np.zeros_like(tensors["position"])
        self._binding: IOBinding = graph.io_binding()
        bind_in, bind_out = self._binding.bind_ortvalue_input, self._binding.bind_ortvalue_output
        bind_in("input_ids", OrtValue.ortvalue_from_numpy(self._ids))
        bind_out("logits", OrtValue.ortvalue_from_numpy(self._logits))
        for name, array in tensors.items():
            past = OrtValue.ortvalue_from_numpy(array)  # shares the array's memory
            # Every layer reads the position, so the next one must not replace it during the run.
            present = OrtValue.ortvalue_from_numpy(self._next_position) if name == "position" else past
            bind_in(PAST + name, past)
            bind_out(PRESENT + name, present)

    def __call__(self, input_ids: NDArray[np.int64]) -> NDArray[np.float32]:
        if input_ids.shape != self._ids.shape:
            raise ValueError(f"input_ids has {len(input_ids)} rows; the state is of batch size {len(self._ids)}")
        self._ids[:] = input_ids
        self.graph.run_with_iobinding(self._binding)
        self._position[...] = self._next_position
        return self._logits.copy()


def load_graph(path: Path, threads: int | None = None) -> InferenceSession:
    """An onnxruntime session on the CPU."""
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = threads or torch.get_num_threads()
    return onnxruntime.InferenceSession(path, options, providers=["CPUExecutionProvider"])


def run_copying(
    graph: InferenceSession, input_ids: Tensor, state: OnnxState, layers: int = 0
) -> tuple[OnnxOutput, list[Tensor]]:
    """Output of either graph by a plain run, which copies the state, and the slots of the first ``layers`` layers."""
    feeds = {"input_ids": input_ids.numpy()} | {PAST + name: array for name, array in state.tensors.items()}
    present = [PRESENT + name for name in state.tensors]
    logits, *rest = graph.run(["logits", *present, *(f"{SLOTS}{i}" for i in range(layers))], feeds)
    arrays, slots = rest[: len(present)], rest[len(present) :]
    # A scalar may come back as a plain number.
    after = OnnxState(dict(zip(state.tensors, map(np.asarray, arrays), strict=True)))
    return OnnxOutput(torch.from_numpy(logits), after), [torch.from_numpy(x) for x in slots]
