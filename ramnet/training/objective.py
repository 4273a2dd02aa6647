"""The loss of a batch, and how it is computed: in parts, in bfloat16, with activations recomputed."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.utils import _pytree
from torch.utils.checkpoint import checkpoint

from ramnet import ops
from ramnet.baselines import BaselineForCausalLM
from ramnet.loss import IGNORED, summed_cross_entropy
from ramnet.state import RamState
from ramnet.training.batch import Batch
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

    def forward(self, batch: Batch, state: RamState | None = None) -> tuple[Tensor, RamState | None]:
        """Return the sum in nats, a float32 scalar, and the state after the batch, detached.

        The output head runs only for tokens whose label is not ``IGNORED``: in recall, 8 of 64.

        Args:
            state: the state of the rows after the batch before; of rows that do not continue, it is not used.

        Raises:
            ValueError: if the batch has rows of several documents or rows that continue, and the model is a baseline.
        """
        inputs, labels, begins, continues = batch
        options: dict[str, Any] = {}
        if begins is not None or continues is not None:
            if isinstance(self.model, BaselineForCausalLM):
                kind = "hold several documents" if continues is None else "continue"
                raise ValueError(f"rows that {kind} need a RAM-Net, not the mixer {self.model.config.mixer!r}")
            if begins is not None:
                inputs, labels = inputs.flatten().unsqueeze(0), labels.flatten().unsqueeze(0)
                (firsts,) = begins.flatten().nonzero(as_tuple=True)
                options["cu_seqlens"] = torch.cat([firsts, firsts.new_tensor([inputs.shape[1]])])
            if continues is not None and state is not None:
                fresh = RamState.zeros(self.model.config, len(inputs), device=inputs.device)
                options["state"] = _pytree.tree_map(partial(_where, continues), state, fresh)
        reduced = self.precision != torch.float32
        with torch.autocast(inputs.device.type, dtype=self.precision, enabled=reduced):
            hidden, after = self._hidden_states(inputs, **options)
            counted = labels != IGNORED
            loss = summed_cross_entropy(self.model.head, hidden[counted], labels[counted], self.model.config.vocab_size)
        return loss, None if continues is None else _pytree.tree_map(torch.detach, after)


def _where(condition: Tensor, x: Tensor, other: Tensor) -> Tensor:
    """Return rows of ``x`` where ``condition`` [B], rows of ``other`` elsewhere."""
    return torch.where(condition.view(-1, *[1] * (x.dim() - 1)), x, other)


@contextmanager
def recomputed(model: Model, enabled: bool) -> Iterator[None]:
    """Within the block, and if ``enabled``, recompute the activations of the model's blocks in the backward pass."""
    blocks = list(model.blocks) if enabled else []
    for block in blocks:
        block.__dict__["forward"] = partial(_recomputed, block.forward)
    try:
        yield
    finally:
        for block in blocks:
            del block.__dict__["forward"]  # the class's method remains


def _recomputed(forward: Callable[..., Any], *arguments: Any) -> Any:
    return checkpoint(ops.keeping(forward), *arguments, use_reentrant=False)
