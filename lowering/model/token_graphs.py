"""Decoding through CUDA graphs: the launches of a token recorded once, and queued as one from then on.

A layer's token is some ten short launches, which Python may take longer to queue than the GPU to run.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, TypeVar

import torch
from torch import Tensor

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
    with torch.cuda.graph(graph, stream=stream):
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

    Args:
        model: called with ``in_place=True``. Its parameters may be moved and converted, but not replaced by others.
        record: how to record; tests give one that needs no GPU.
        kept: graphs, the latest used. Each holds the activations of a token.
    """

    def __init__(self, model: RamNetForCausalLM, record: Record = record_cuda, kept: int = 8) -> None:
        self.model, self.record, self.kept = model, record, kept
        self.parameters = list(model.parameters())
        self._recorded: OrderedDict[Any, _Recorded] = OrderedDict()

    @staticmethod
    def serve(input_ids: Tensor) -> bool:
        """Whether a graph can: on a GPU, without gradients, autocast's passing casts, or a recording by the caller."""
        return (
            input_ids.is_cuda
            and not torch.is_grad_enabled()
            and not torch.is_autocast_enabled("cuda")
            and not torch.cuda.is_current_stream_capturing()
        )

    @torch.no_grad()
    def __call__(self, input_ids: Tensor, state: RamState) -> Tensor:
        """Logits [B, 1, V] of ids [B, 1]; ``state`` moves on by a token. Errors as of ``RamNetForCausalLM.forward``."""
        recorded = self._find(input_ids, state)
        recorded.token.copy_(input_ids)
        recorded.replay()
        return recorded.logits.clone()  # the next token overwrites them

    def _find(self, input_ids: Tensor, state: RamState) -> _Recorded:
        state.check(self.model.config, input_ids.shape[0], input_ids.device)
        buffers = (*state.memory, *state.mass, *state.conv, state.position)
        key = (
            input_ids.shape, input_ids.dtype, torch.is_inference_mode_enabled(),
            *((x.data_ptr(), x.dtype, x.stride()) for x in buffers),
            *((x.data_ptr(), x.dtype) for x in self.parameters),
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
            lambda: self.model(token, state, in_place=True).logits,
            lambda: self.model(token, other, in_place=True).logits,
        )
        return _Recorded(token, logits, replay)


def _stand_in(state: RamState) -> RamState:
    """A state to rehearse on, of the same sizes and types: all its layers are one, so that it costs little memory."""
    memory, mass = torch.zeros_like(state.memory[0]), torch.ones_like(state.mass[0])
    return RamState(
        [memory] * len(state.memory), [mass] * len(state.mass), [torch.zeros_like(x) for x in state.conv],
        torch.zeros_like(state.position),
    )  # fmt: skip
