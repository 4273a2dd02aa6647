"""What a task gives to a training step."""

from __future__ import annotations

from typing import NamedTuple, Self

import torch
from torch import Tensor

EVALUATED = 4096  # tokens that an evaluation reads at a time


class Batch(NamedTuple):
    """Rows of tokens and what each predicts.

    Attributes:
        inputs: int64 [B, T].
        labels: int64 [B, T], the token that each predicts, or ``ramnet.loss.IGNORED``.
        begins: bool [B, T], True for a token that begins a document, of rows that hold several; None if each row is
            one sequence.
        continues: bool [B], whether a row goes on where the same row of the batch before ended, with its state; None
            if no row does.
    """

    inputs: Tensor
    labels: Tensor
    begins: Tensor | None = None
    continues: Tensor | None = None

    def split(self, rows: int) -> list[Self]:
        """Return batches of ``rows`` rows each, the last of which may have fewer."""
        count = len(self.inputs.split(rows))
        columns = ([None] * count if x is None else x.split(rows) for x in self)
        return [type(self)(*part) for part in zip(*columns, strict=True)]

    def few_tokens(self) -> list[Self]:
        """Return batches of at most ``EVALUATED`` tokens each, or of one row, as evaluations read them: a run whose
        steps fit into memory has room for them."""
        return self.split(max(1, EVALUATED // self.inputs.shape[1]))

    def to(self, device: torch.device) -> Self:
        """Return the batch on ``device``."""
        begins, continues = (None if x is None else x.to(device) for x in (self.begins, self.continues))
        return type(self)(self.inputs.to(device), self.labels.to(device), begins, continues)
