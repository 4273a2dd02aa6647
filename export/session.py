"""Running an export through onnxruntime."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple, Self, cast

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from export.graphs import GRAPHS, PAST, PRESENT, SLOTS
from export.libraries import need
from export.sidecar import Sidecar
from ramnet import RamNetConfig, RamNetForCausalLM, RamState
from ramnet.generation import generate

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

    def __call__(self, input_ids: Tensor, state: OnnxState | None = None, *, in_place: bool = False) -> OnnxOutput:
        """Logits of every token and the state after the last; as ``RamNetForCausalLM.forward``."""
        if in_place and state is not None:
            return OnnxOutput(self.step(input_ids, state), state)
        return self.prefill(input_ids, state)

    def prefill(self, input_ids: Tensor, state: OnnxState | None = None) -> OnnxOutput:
        """Logits [B, T, V] of ``input_ids`` int64 [B, T], T ≥ 1, and a new state; ``state`` is left as it was."""
        batch, tokens = self._check(input_ids)
        if tokens < 1:
            raise ValueError(f"input_ids has shape {list(input_ids.shape)}; prefill needs [B, T] with T >= 1")
        state = OnnxState.zeros(self.config, batch) if state is None else state
        return run_copying(self.graphs["prefill"], input_ids, state)[0]

    def step(self, input_ids: Tensor, state: OnnxState) -> Tensor:
        """Logits [B, 1, V] of one token ``input_ids`` int64 [B, 1]; updates ``state`` in place.

        Each array of the state is bound as past and present at once, so that onnxruntime writes K rows of it and
        copies none: the time does not depend on M.
        """
        batch, tokens = self._check(input_ids)
        if tokens != 1:
            raise ValueError(f"in_place takes one token at a time, not {tokens}")
        if state._step is None:
            state._step = _BoundStep(self.graphs["decode"], state.tensors, batch, self.config.vocab_size)
        return torch.from_numpy(state._step(input_ids.numpy()))

    def generate(self, input_ids: Tensor, max_new_tokens: int, **sampling: Any) -> Tensor:
        """``input_ids`` [B, T] followed by what the model says; see ``ramnet.generation.generate``."""
        # That function asks of its model only what this class has: a call, and the vocabulary's size.
        return generate(cast(RamNetForCausalLM, self), input_ids, max_new_tokens, **sampling)

    def _check(self, input_ids: Tensor) -> tuple[int, int]:
        if input_ids.dim() != 2 or input_ids.dtype != torch.int64:
            raise ValueError(f"input_ids is {input_ids.dtype} {list(input_ids.shape)}; it must be int64 [B, T]")
        return input_ids.shape[0], input_ids.shape[1]


class _BoundStep:
    """The decode graph with its buffers bound once, as they are the same at every step."""

    def __init__(self, graph: InferenceSession, tensors: dict[str, NDArray[Any]], batch: int, vocab_size: int) -> None:
        from onnxruntime import OrtValue

        self._graph = graph
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
            raise ValueError(f"input_ids has shape {list(input_ids.shape)} but the state's is {list(self._ids.shape)}")
        self._ids[:] = input_ids
        self._graph.run_with_iobinding(self._binding)
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
