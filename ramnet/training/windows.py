"""How rows are taken from documents: windows within one, rows of several, or windows that follow one another."""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor

from ramnet.loss import IGNORED
from ramnet.training.batch import Batch
from ramnet.training.tokens import Tokens

Kind = Literal["within a document", "packed", "carried"]


class Windows:
    """All windows of ``length`` tokens with their next tokens, numbered from 0. No window spans two documents.

    A window may begin from ``length`` − 1 tokens before its document up to the document's last token but one, and is
    clipped to the document, so that every token is an input in equally many windows. Documents of one token have no
    windows, as there is nothing to predict.
    """

    def __init__(self, tokens: Tokens, length: int) -> None:
        self.tokens, self.length = tokens, length
        self.counts = torch.where(tokens.sizes > 1, tokens.sizes + length - 2, 0)
        self.ends = self.counts.cumsum(0)

    def __len__(self) -> int:
        return int(self.ends[-1]) if len(self.ends) else 0

    def take(self, numbers: Tensor) -> Batch:
        """Return the windows of these ``numbers``, int64 [N], as rows [N, length].

        Beyond the window's tokens, inputs are 0 and labels IGNORED.
        """
        which = torch.searchsorted(self.ends, numbers, right=True)
        start = numbers - (self.ends - self.counts)[which] - self.length + 1
        return _clipped(self.tokens, which, start.clamp(min=0), start + self.length, self.length)

    def spread(self, count: int) -> Batch:
        """Return ``count`` evenly spaced windows, or all if there are fewer."""
        total = len(self)
        return self.take(torch.linspace(0, total - 1, min(total, count), dtype=torch.float64).long())

    def batch(self, size: int, generator: torch.Generator) -> Batch:
        """Draw ``size`` windows uniformly."""
        return self.take(torch.randint(len(self), (size,), generator=generator))


class Packed:
    """Rows of ``length`` tokens from anywhere in the text, which hold the documents that lie there; no row has padding.

    The text is taken as a ring, so that every token is in equally many rows. Documents stay apart: the last token of a
    document has no label, and ``Batch.begins`` tells where each begins.
    """

    def __init__(self, tokens: Tokens, length: int) -> None:
        self.tokens, self.length = tokens, length
        self.starts = tokens.starts[tokens.sizes > 0]

    def batch(self, size: int, generator: torch.Generator) -> Batch:
        """Draw ``size`` rows uniformly."""
        count = len(self.tokens.ids)
        first = torch.randint(count, (size, 1), generator=generator)
        places = (first + torch.arange(self.length + 1)) % count
        found, begins = self.tokens.at(places), self._begins(places)
        labels = found[:, 1:].masked_fill(begins[:, 1:], IGNORED)
        begins[:, 0] = True
        return Batch(found[:, :-1], labels, begins[:, :-1])

    def _begins(self, places: Tensor) -> Tensor:
        nearest = torch.searchsorted(self.starts, places).clamp(max=len(self.starts) - 1)
        return self.starts[nearest] == places


class Carried:
    """Windows of ``length`` tokens that follow one another: each row reads a document from its beginning to its end.

    At the end it goes on with another document, drawn uniformly, so that every token is read equally often.

    Attributes:
        places: int64 [B, 2], the document of each row and the tokens of it that are read; None before the first batch.
    """

    def __init__(self, tokens: Tokens, length: int) -> None:
        self.tokens, self.length = tokens, length
        self.usable = (tokens.sizes > 1).nonzero().squeeze(1)
        self.places: Tensor | None = None

    def resume(self, places: Tensor | None) -> None:
        """Go on from these ``places``. Raises ValueError if they are not places of this text."""
        if places is not None:
            known = len(self.tokens.sizes)
            if places.dim() != 2 or places.shape[1] != 2 or places.dtype != torch.int64:
                raise ValueError(f"places are {places.dtype} {list(places.shape)}; they must be int64 [B, 2]")
            if bool((places < 0).any()) or bool((places[:, 0] >= known).any()):
                raise ValueError(f"places hold a document outside 0..{known - 1}, or a negative number")
        self.places = places

    def batch(self, size: int, generator: torch.Generator) -> Batch:
        """Return the next window of each of ``size`` rows."""
        if self.places is None:
            self.places = torch.zeros(size, 2, dtype=torch.int64)
            ended = torch.ones(size, dtype=torch.bool)
        else:
            ended = self.places[:, 1] >= self.tokens.sizes[self.places[:, 0]] - 1
        drawn = self.usable[torch.randint(len(self.usable), (size,), generator=generator)]
        which, start = torch.where(ended, drawn, self.places[:, 0]), self.places[:, 1].masked_fill(ended, 0)
        self.places = torch.stack([which, start + self.length], dim=1)
        inputs, labels, *_ = _clipped(self.tokens, which, start, start + self.length, self.length)
        return Batch(inputs, labels, continues=~ended)


def _clipped(tokens: Tokens, which: Tensor, first: Tensor, end: Tensor, length: int) -> Batch:
    """Return tokens ``first`` to ``end`` of the documents ``which``, all int64 [N], as far as they go, in rows."""
    last = torch.minimum(end, tokens.sizes[which] - 1)
    places = first.unsqueeze(1) + torch.arange(length + 1)  # within the document
    found = tokens.at(tokens.starts[which].unsqueeze(1) + places.minimum(last.unsqueeze(1)))
    inside = places[:, 1:] <= last.unsqueeze(1)
    return Batch(found[:, :-1].where(inside, 0), found[:, 1:].where(inside, IGNORED))


ROWS: dict[Kind, type[Windows] | type[Packed] | type[Carried]] = {
    "within a document": Windows, "packed": Packed, "carried": Carried,
}  # fmt: skip
