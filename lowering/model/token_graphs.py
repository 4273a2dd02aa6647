"""Decoding with CUDA graphs, which queue all kernels of a token at once.

A layer launches about ten short kernels per token, which Python may take longer to queue than the GPU to run.
"""

from __future__ import annotations

import threading
from collections import OrderedDict
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Self, TypeVar

import torch
from torch import Tensor
from torch.autograd.graph import increment_version

from lowering.model.untouched import Tree
from ramnet.model import RamNetForCausalLM
from ramnet.state import RamState

Result = TypeVar("Result")
# Takes the function to record, and the same function on a dummy state for warm-up. Returns a function that replays the
# recording, and the buffer of its result.
Record = Callable[[Callable[[], Tensor], Callable[[], Tensor]], tuple[Callable[[], None], Tensor]]


def record_cuda(run: Callable[[], Result], rehearse: Callable[[], object]) -> tuple[Callable[[], None], Result]:
    """Record ``run`` as a CUDA graph, without running it. Returns its replay function and the buffers of its result.

    ``rehearse`` is run first, on a side stream, because compiling and loading kernels cannot be recorded. Raises
    RuntimeError if ``run`` synchronises with the device.
    """
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(3):  # in their first calls, libraries select their kernels
            rehearse()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    # "thread_local" allows other threads to allocate memory during the capture.
    with torch.cuda.graph(graph, stream=stream, capture_error_mode="thread_local"):
        result = run()
    return graph.replay, result


@dataclass(frozen=True)
class _Recorded:
    token: Tensor
    logits: Tensor
    replay: Callable[[], None]


class TokenGraphs:
    """Decodes single tokens in place by replaying CUDA graphs.

    A graph uses the addresses of the state and the parameters that it was recorded with, and reads its token from its
    own buffer. Recording takes as long as several tokens, so it pays to keep decoding with one state rather than with
    copies of it. If a module or parameter of the model is replaced, moved or converted, a new graph is recorded.

    Args:
        model: the model whose modules, parameters and configuration the graphs depend on.
        step: computes logits [B, 1, V] of ids [B, 1], updating the state in place.
        record: records a graph; tests use one that needs no GPU.
        kept: the number of most recently used graphs to keep. Each holds the activations of a token.
    """

    def __init__(
        self, model: RamNetForCausalLM, step: Callable[[Tensor, RamState], Tensor], record: Record = record_cuda,
        kept: int = 8,
    ) -> None:  # fmt: skip
        self.model, self.step, self.record, self.kept = model, step, record, kept
        self.tree = Tree(model)
        self._recorded: OrderedDict[Any, _Recorded] = OrderedDict()
        self._finding = threading.Lock()

    def serve(self, input_ids: Tensor) -> bool:
        """Return whether a graph can be used: on a GPU, with gradients and autocast disabled, without hooks (a replay
        would not call them), and while the caller is not capturing a graph."""
        return (
            input_ids.is_cuda
            and not torch.is_grad_enabled()
            and not torch.is_autocast_enabled("cuda")
            and not torch.cuda.is_current_stream_capturing()
            and not self.tree.is_hooked()
        )

    @torch.no_grad()
    def __call__(self, input_ids: Tensor, state: RamState) -> Tensor:
        """Return logits [B, 1, V] of ids [B, 1], updating ``state`` in place; raises as ``RamState.check`` does."""
        with self._finding:
            recorded = self._find(input_ids, state)
        recorded.token.copy_(input_ids)
        recorded.replay()
        # Autograd does not see what a graph writes.
        increment_version((*state.memory, *state.mass, *state.conv, state.position))
        return recorded.logits.clone()  # the next token overwrites them

    def _find(self, input_ids: Tensor, state: RamState) -> _Recorded:
        state.check(self.model.config, input_ids.shape[0], input_ids.device, in_place=True)
        if self.tree.has_changed():
            self.tree, self._recorded = Tree(self.model), OrderedDict()
        buffers = (*state.memory, *state.mass, *state.conv, state.position)
        key = (
            input_ids.shape, input_ids.dtype, torch.is_inference_mode_enabled(),
            *((x.data_ptr(), x.dtype, x.stride()) for x in buffers),
            *((x.data_ptr(), x.dtype) for x in self.tree.parameters),
        )  # fmt: skip
        if key not in self._recorded:
            self._recorded[key] = self._new(input_ids, state)
            if len(self._recorded) > self.kept:
                self._recorded.popitem(last=False)
        self._recorded.move_to_end(key)
        return self._recorded[key]

    def _new(self, input_ids: Tensor, state: RamState) -> _Recorded:
        token = input_ids.clone()
        other = _StandIn.of(state)
        replay, logits = self.record(
            lambda: self.step(token, state),
            lambda: self.step(token, other),
        )
        return _Recorded(token, logits, replay)


class _StandIn(RamState):
    """A state for warm-up, so that the real one is not changed. Layers of one shape share memory to keep it small."""

    @classmethod
    def of(cls, state: RamState) -> Self:
        memory = {x.shape: torch.zeros_like(x) for x in state.memory}
        mass = {x.shape: torch.ones_like(x) for x in state.mass}
        return cls(
            [memory[x.shape] for x in state.memory], [mass[x.shape] for x in state.mass],
            [torch.zeros_like(x) for x in state.conv], torch.zeros_like(state.position),
        )  # fmt: skip

    def check(self, *_: Any, **__: Any) -> None:
        """Accept it: shared memory would be refused, and all else is as in the state that it stands for."""
