"""The loss of a batch, and how it is computed: in parts, in bfloat16, with activations recomputed."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from ramnet import ops
from ramnet.loss import IGNORED, summed_cross_entropy
from ramnet.training.model import Model


class Execution(NamedTuple):
    """How a step is computed. None of it changes what is computed, except for rounding.

    Attributes:
        compiled: compile the model's hidden states, forward and backward, with torch.compile.
        micro_batch: rows computed at a time; the gradients of a batch's parts are added up. None computes all at once.
        recompute: keep only the inputs of each block, and recompute its activations in the backward pass.
    """

    compiled: bool = False
    micro_batch: int | None = None
    recompute: bool = False


class Objective(nn.Module):
    """The cross entropy of a model, summed over the labels of a batch."""

    def __init__(self, model: Model, precision: str, compiled: bool) -> None:
        super().__init__()
        self.model = model
        self.precision = getattr(torch, precision)
        self._hidden_states: Callable[..., Any] = (
            torch.compile(model.hidden_states) if compiled else model.hidden_states
        )

    def forward(self, inputs: Tensor, labels: Tensor) -> Tensor:
        """Return the sum in nats, a float32 scalar, of inputs and labels, int64 [B, T]; see ``summed_cross_entropy``.

        The output head runs only for tokens whose label is not ``IGNORED``: in recall, 8 of 64.
        """
        reduced = self.precision != torch.float32
        with torch.autocast(inputs.device.type, dtype=self.precision, enabled=reduced):
            hidden, _ = self._hidden_states(inputs)
            counted = labels != IGNORED
            return summed_cross_entropy(self.model.head, hidden[counted], labels[counted], self.model.config.vocab_size)


@contextmanager
def recomputed(model: Model, enabled: bool) -> Iterator[None]:
    """Within the block, and if ``enabled``, recompute the activations of the model's blocks in the backward pass."""
    blocks = list(model.blocks) if enabled else []
    for block in blocks:
        block.__dict__["forward"] = partial(_recomputed, block.forward, ops.active())
    try:
        yield
    finally:
        for block in blocks:
            del block.__dict__["forward"]  # the class's method remains


def _recomputed(forward: Callable[..., Any], kernels: str, *arguments: Any) -> Any:
    def again(*arguments: Any) -> Any:
        # The backward pass of a GPU runs in a thread of its own, which would run the reference.
        with ops.using(kernels):
            return forward(*arguments)

    return checkpoint(again, *arguments, use_reentrant=False)
