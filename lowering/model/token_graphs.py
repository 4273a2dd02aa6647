"""Decoding through CUDA graphs: the launches of a token recorded once, and queued as one from then on.

A layer's token is some ten short launches, which Python may take longer to queue than the GPU to run.
"""

from __future__ import annotations

import threading
from collections import OrderedDict
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, TypeVar

import torch
from torch import Tensor

from lowering.model.untouched import Tree
from ramnet.model import RamNetForCausalLM
from ramnet.state import RamState

Result = TypeVar("Result")
# Called with what to record and with the same on buffers of no account: how to replay it, and the result's buffer.
Record = Callable[[Callable[[], Tensor], Callable[[], Tensor]], tuple[Callable[[], None], Tensor]]


def record_cuda(run: Callable[[], Result], rehearse: Callable[[], object]) -> tuple[Callable[[], None], Result]:
    """Record ``run`` as a CUDA graph, without running it: how to replay it, and what ``run`` gave, its buffers.

    ``rehearse`` goes first, on a side stream, because compiling and loading kernels cannot be recorded. RuntimeError
    where ``run`` waits for the device.
    """
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(3):  # libraries choose among their kernels in the first calls
            rehearse()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    # Other threads may allocate memory meanwhile.
    with torch.cuda.graph(graph, stream=stream, capture_error_mode="thread_local"):
        result = run()
    return graph.replay, result


@dataclass(frozen=True)
class _Recorded:
    token: Tensor
    logits: Tensor
    replay: Callable[[], None]


class TokenGraphs:
    """A model's single tokens in place, each replayed from a graph of its buffers.

    A graph reads and writes the addresses it was recorded with, the state's and the parameters', and takes its token
    from a buffer of its own. Recording takes some tokens' time, so decode on with a state rather than on copies of it.

    A model whose modules or parameters were replaced, moved or converted is recorded anew.

    Args:
        model: whose modules, parameters and configuration the token depends on.
        step: logits [B, 1, V] of ids [B, 1], the state updated in place.
        record: how to record; tests give one that needs no GPU.
        kept: graphs, the latest used. Each holds the activations of a token.
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
        """Whether a graph can: on a GPU, without gradients, autocast's passing casts, a recording by the caller, or
        hooks, which a replay would not call."""
        return (
            input_ids.is_cuda
            and not torch.is_grad_enabled()
            and not torch.is_autocast_enabled("cuda")
            and not torch.cuda.is_current_stream_capturing()
            and not self.tree.is_hooked()
        )

    @torch.no_grad()
    def __call__(self, input_ids: Tensor, state: RamState) -> Tensor:
        """Logits [B, 1, V] of ids [B, 1]; ``state`` moves on by a token. Errors as of ``RamNetForCausalLM.forward``."""
        with self._finding:
            recorded = self._find(input_ids, state)
        recorded.token.copy_(input_ids)
        recorded.replay()
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
        other = _stand_in(state)
        replay, logits = self.record(
            lambda: self.step(token, state),
            lambda: self.step(token, other),
        )
        return _Recorded(token, logits, replay)


def _stand_in(state: RamState) -> RamState:
    """A state to rehearse on, of the same sizes and types: all its layers are one, so that it costs little memory."""
    memory, mass = torch.zeros_like(state.memory[0]), torch.ones_like(state.mass[0])
    return RamState(
        [memory] * len(state.memory), [mass] * len(state.mass), [torch.zeros_like(x) for x in state.conv],
        torch.zeros_like(state.position),
    )  # fmt: skip
