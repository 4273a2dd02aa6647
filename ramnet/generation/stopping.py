"""Stop tokens and stop strings."""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence
from numbers import Integral

import torch
from torch import Tensor

from ramnet.config import BYTES
from ramnet.generation.checks import check


class Stops:
    """The conditions that end a row; false if there are none.

    Args:
        tokens: a row ends after generating one of these.
        strings: a row ends once the text of its new tokens contains one of these.
        decode: converts token ids to text; None if token ids are bytes of UTF-8.
        vocab_size: V.

    Raises:
        ValueError: if a string is empty, or strings are given without ``decode`` and token ids are not bytes.
        TypeError: if a token is not an integer, or a string is not a string.
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
                f"stop is {strings[0]!r} but the model has {vocab_size} tokens, which are not bytes; give decode, which"
                " converts token ids to text"
            )
        self.tokens, self.strings, self.decode = sorted(tokens), strings, decode
        self.bytes = [string.encode("utf-8", "surrogateescape") for string in strings]

    def __bool__(self) -> bool:
        return bool(self.tokens or self.strings)

    def found_in(self, generated: list[int]) -> bool:
        """Return whether the text of these new tokens contains a stop string; before the last one it had none."""
        if self.decode is not None:
            text = self.decode(generated)
            return any(string in text for string in self.strings)
        return any(bytes(generated[-len(string) :]) == string for string in self.bytes)


class Watch:
    """Checks the generated tokens of each row for stops."""

    def __init__(self, stops: Stops, rows: int, device: torch.device) -> None:
        self.stops = stops
        self.tokens = torch.tensor(stops.tokens, dtype=torch.int64, device=device)
        self.generated: list[list[int]] = [[] for _ in range(rows)]

    def after(self, token: Tensor) -> Tensor:
        """Return bool [B], whether the tokens, int64 [B], end their rows. Stop strings synchronise with the device."""
        ended = torch.isin(token, self.tokens)
        if self.stops.strings:
            for row, each in zip(self.generated, token.tolist(), strict=True):
                row.append(each)
            found = [self.stops.found_in(row) for row in self.generated]
            ended = ended | torch.tensor(found, device=token.device)
        return ended

    def reorder(self, index: Tensor) -> None:
        """Give row i the tokens of row ``index[i]``."""
        if self.stops.strings:
            self.generated = [list(self.generated[i]) for i in index.tolist()]
