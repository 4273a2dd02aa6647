"""The options of generation, checked where they are given. They need no PyTorch."""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Iterable, Sequence
from dataclasses import dataclass
from numbers import Integral, Real

from ramnet.config import BYTES
from ramnet.generation.checks import check

# Tokens of a prompt that are read together, over all rows. Measured for "340m" in float32 on a CPU: 175 MB of
# activations, against 1.05 GB for 16 384 tokens, and no slower.
TOKENS_AT_ONCE = 2048


@dataclass(frozen=True)
class SamplingOptions:
    """How a token is chosen, the arguments of ``generate``. Raises ValueError or TypeError for values out of range."""

    temperature: float = 0.0
    top_k: int = 0
    top_p: float = 1.0
    min_p: float = 0.0
    repetition_penalty: float = 1.0

    def __post_init__(self) -> None:
        check("temperature", self.temperature, Real, lambda x: 0 <= x < math.inf, "finite and >= 0")
        check("top_k", self.top_k, Integral, lambda x: x >= 0, ">= 0")
        check("top_p", self.top_p, Real, lambda x: 0 < x <= 1, "in (0, 1]")
        check("min_p", self.min_p, Real, lambda x: 0 <= x <= 1, "in [0, 1]")
        check("repetition_penalty", self.repetition_penalty, Real, lambda x: 1e-3 <= x <= 1e3, "in [0.001, 1000]")


class Stops:
    """The conditions that end a row; false if there are none.

    Args:
        tokens: a row ends after generating one of these.
        strings: a row ends once the text of its new tokens contains one of these.
        decode: converts token ids to text; None if token ids are bytes of UTF-8.
        vocab_size: V.

    Raises:
        ValueError: if a string is empty or cannot be encoded, or strings are given without ``decode`` and token ids are
            not bytes.
        TypeError: if a token is not an integer, or a string is not a string.
    """

    def __init__(
        self, tokens: Collection[int], strings: str | Sequence[str], decode: Callable[[list[int]], str] | None,
        vocab_size: int,
    ) -> None:  # fmt: skip
        if not isinstance(tokens, Iterable):
            raise TypeError(f"stop_tokens is {tokens!r}; it must be token ids, such as [{tokens!r}]")
        tokens = list(tokens)
        for token in tokens:
            check("stop_tokens", token, Integral, lambda x: 0 <= x < 2**63, "token ids")
        if not isinstance(strings, Iterable) or isinstance(strings, bytes):
            raise TypeError(f"stop is {strings!r}; it must be a string or several")
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
        try:
            self.bytes = [string.encode("utf-8", "surrogateescape") for string in strings]
        except UnicodeEncodeError as error:
            raise ValueError(f"stop is {error.object!r}; it must be text, which UTF-8 can encode") from None

    def __bool__(self) -> bool:
        return bool(self.tokens or self.strings)

    def found_in(self, generated: list[int]) -> bool:
        """Return whether the text of these new tokens contains a stop string; before the last one it had none."""
        if self.decode is not None:
            text = self.decode(generated)
            return any(string in text for string in self.strings)
        return any(bytes(generated[-len(string) :]) == string for string in self.bytes)
