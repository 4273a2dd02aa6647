"""Where a row ends: at tokens, or at strings in what it has said."""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence
from numbers import Integral

import torch
from torch import Tensor

from ramnet.generation.checks import check

BYTES = 256  # the tokens of a model whose token ids are bytes


class Stops:
    """What ends a row, if anything does.

    Args:
        tokens: each ends a row that says it.
        strings: each ends a row whose new text holds it.
        decode: the text of new token ids; where it is None, and there are strings, ids must be bytes of UTF-8.

    Raises:
        ValueError: for an empty string, or strings that nothing can find.
        TypeError: for tokens that are no integers, or strings that are none.
    """

    def __init__(
        self, tokens: Collection[int], strings: str | Sequence[str], decode: Callable[[list[int]], str] | None,
        vocab_size: int,
    ) -> None:  # fmt: skip
        for token in tokens:
            check("stop_tokens", token, Integral, lambda x: 0 <= x < 2**63, "token ids")
        strings = [strings] if isinstance(strings, str) else list(strings)
        for string in strings:
            if not isinstance(string, str):
                raise TypeError(f"stop is {string!r}; it must be a string or several")
            if not string:
                raise ValueError("stop is ''; it must hold at least one character")
        if strings and decode is None and vocab_size != BYTES:
            raise ValueError(
                f"stop is {strings[0]!r} but the model has {vocab_size} tokens, which are no bytes; give decode, from"
                " token ids to text"
            )
        self.tokens, self.strings, self.decode = sorted(tokens), strings, decode
        self.bytes = [string.encode("utf-8", "surrogateescape") for string in strings]

    def __bool__(self) -> bool:
        return bool(self.tokens or self.strings)

    def found_in(self, said: list[int]) -> bool:
        """Whether a string is in these new tokens, of which all but the last held none."""
        if self.decode is not None:
            text = self.decode(said)
            return any(string in text for string in self.strings)
        return any(bytes(said[-len(string) :]) == string for string in self.bytes)


class Watch:
    """Follows what ``rows`` say."""

    def __init__(self, stops: Stops, rows: int, device: torch.device) -> None:
        self.stops = stops
        self.tokens = torch.tensor(stops.tokens, dtype=torch.int64, device=device)
        self.said: list[list[int]] = [[] for _ in range(rows)]

    def after(self, token: Tensor) -> Tensor:
        """bool [B]: whether the tokens int64 [B] end their rows; waits for the device where there are strings."""
        ended = torch.isin(token, self.tokens)
        if self.stops.strings:
            for row, each in zip(self.said, token.tolist(), strict=True):
                row.append(each)
            found = [self.stops.found_in(row) for row in self.said]
            ended = ended | torch.tensor(found, device=token.device)
        return ended

    def reorder(self, index: Tensor) -> None:
        """Row i goes on from what row ``index[i]`` said."""
        if self.stops.strings:
            self.said = [list(self.said[i]) for i in index.tolist()]
