"""What the language models are compared on: held-out text, repeated names in it, and text with more context."""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from typing import Any, Literal

import torch
from torch import Tensor

from ramnet.config import BYTES
from ramnet.loss import IGNORED
from ramnet.training.batch import Batch
from ramnet.training.model import Model
from ramnet.training.text import Text

NAME = re.compile(rb"[A-Za-z_][A-Za-z0-9_]{3,}")
WINDOWS = 256
SPANS = 64
# Bytes at the end of a span that are predicted in every window.
PREDICTED = 64


class Compared(Text):
    """Text in bytes, with scores beyond the mean of held-out windows.

    Args:
        files, length: as in ``Text``.
        contexts: bytes of the windows, ascending and at least ``PREDICTED``, in which the same held-out bytes are
            predicted: the last of each window, so that none stands beyond the places that a model was trained on if
            the window is no longer than ``length``.

    Raises:
        ValueError: as ``Text``; if no name is repeated in the held-out windows, or no held-out document is as long as
            the longest window.
    """

    best: Literal["highest", "lowest"] = "lowest"

    def __init__(self, files: Sequence[str], length: int, contexts: tuple[int, ...]) -> None:
        self.check({"files": files, "length": length}, BYTES)
        super().__init__(files, length)
        self.contexts = contexts
        self._windows = self.held_out.spread(WINDOWS)
        self._counted = self._windows.labels != IGNORED
        self._again = self._counted & repeated(self._windows)
        if not bool(self._again.any()):
            raise ValueError(f"no name is repeated within {length} bytes of the held-out text; give more text")
        self._spans = self._spread_spans(contexts[-1])

    def describe(self) -> dict[str, Any]:
        """Return what defines the task and its scores."""
        scored = {"contexts": list(self.contexts), "predicted": PREDICTED, "windows scored": WINDOWS, "spans": SPANS}
        return super().describe() | scored

    def scores(self, model: Model) -> list[float]:
        """Return bits per byte: of held-out windows, of repeated names in them, and in windows of ``contexts``.

        A repeated name is a word of at least 4 letters, digits and underscores that stands earlier in the same window.
        Its first byte, with which the model cannot know that a name follows, is not counted.
        """
        bits = bits_of(model, self._windows)
        return [float(bits[self._counted].mean()), float(bits[self._again].mean()), *self.by_context(model)]

    def by_context(self, model: Model) -> list[float]:
        """Return the bits per byte of the last ``PREDICTED`` bytes of held-out spans, in windows of ``contexts``."""
        found = []
        for context in self.contexts:
            ids = self._spans[:, -context - 1 :]
            labels = torch.full_like(ids[:, 1:], IGNORED)
            labels[:, -PREDICTED:] = ids[:, -PREDICTED:]
            found.append(float(bits_of(model, Batch(ids[:, :-1], labels))[:, -PREDICTED:].mean()))
        return found

    def _spread_spans(self, length: int) -> Tensor:
        """Return evenly spaced spans of held-out documents, int64 [SPANS, length + 1]."""
        documents = self.held_out.tokens
        room = torch.where(documents.sizes > length, documents.sizes - length, 0)
        if not int(room.sum()):
            raise ValueError(
                f"the longest held-out document holds {int(documents.sizes.max())} bytes; a window of"
                f" {self.contexts[-1]} needs {length + 1}"
            )
        ends = room.cumsum(0)
        numbers = torch.linspace(0, int(ends[-1]) - 1, SPANS, dtype=torch.float64).long()
        which = torch.searchsorted(ends, numbers, right=True)
        start = documents.starts[which] + numbers - (ends - room)[which]
        return documents.at(start.unsqueeze(1) + torch.arange(length + 1))


@torch.no_grad()
def bits_of(model: Model, batch: Batch) -> Tensor:
    """Return the bits of each label, float32 [B, T], 0 where it is IGNORED. Each row is read from a fresh state."""
    device = model.embedding.weight.device
    found = []
    for part in (each.to(device) for each in batch.few_tokens()):
        hidden = model.hidden_states(part.inputs)[0]
        counted = part.labels != IGNORED
        logits = model.head(hidden[counted]).float()
        bits = torch.zeros(part.labels.shape, device=device)
        bits[counted] = torch.nn.functional.cross_entropy(logits, part.labels[counted], reduction="none") / math.log(2)
        found.append(bits.cpu())
    return torch.cat(found)


def repeated(batch: Batch) -> Tensor:
    """Return which labels belong to a repeated name, bool [B, T]; see ``Compared.scores``."""
    marks = torch.zeros(batch.labels.shape, dtype=torch.bool)
    for mark, first, labels in zip(marks, batch.inputs[:, 0], batch.labels, strict=True):
        text = bytes([int(first), *labels[labels != IGNORED].tolist()])
        seen = set()
        for name in NAME.finditer(text):
            if name[0] in seen:
                mark[name.start() : name.end() - 1] = True  # label t is byte t + 1
            seen.add(name[0])
    return marks
