"""The seconds of a search: what is left of them, and what its parts are expected to take, by those before them."""

from __future__ import annotations

from dataclasses import dataclass
from time import perf_counter
from typing import NamedTuple

FINALISTS = 3
TOKENS = (2, 4, 8)  # of a prompt that share a loop
BLOCKS = (32, 64, 128)  # tokens of a prompt that share a read of the weights


@dataclass(frozen=True)
class Progress:
    """The progress of a search; ``best`` are the seconds of a token of the fastest that loses little."""

    doing: str
    trials: int
    best: float | None
    failures: int
    seconds_left: float


class Part(NamedTuple):
    """A comparison after the trials: the most libraries that it builds, and its seconds of timing."""

    doing: str
    libraries: int
    seconds: float


TRIAL = 2.0  # seconds of timing
AGAIN = Part("measuring the best again", 1, 6.0)  # which were built, but have to be opened
PROMPTS = Part("choosing how prompts are read", len(TOKENS) - 1, 6.0)
BLOCK = Part("choosing how often prompts read the weights", len(BLOCKS) - 1, 6.0)
PROMPT_THREADS = Part("choosing the threads of prompts", 2, 6.0)
AGAINST = Part("measuring it beside what it is compared with", 2, 12.0)  # lowering.compile builds a library of its own

# The timings of a search of this many seconds take as long as they say; those of a shorter one take less.
_USUAL = 180.0


class Costs:
    """The seconds of a search, in which everything counts.

    Args:
        seconds: in all.
        begin: when the search began, by ``perf_counter``.

    Attributes:
        end: when it must end.
        opening: the longest seconds of building, loading and checking one library; 0 before the first.
        trial: the latest seconds of a trial, by whether it was a default, whose loss is measured too.
    """

    def __init__(self, seconds: float, begin: float) -> None:
        self.seconds, self.end = seconds, begin + seconds
        self.opening = 0.0
        self.trial: dict[bool, float] = {}

    def left(self) -> float:
        return self.end - perf_counter()

    def timing(self, most: float) -> float:
        """Return the seconds of a timing that takes ``most`` in a long search."""
        return most * min(1.0, self.seconds / _USUAL)

    def of_trial(self, default: bool) -> float:
        """Return the expected seconds of a trial: as long as the latest of its kind, or of any; 0 for the first."""
        return self.trial.get(default, max(self.trial.values(), default=0.0))

    def of_part(self, part: Part) -> float:
        """Return the expected seconds of a part."""
        return part.libraries * self.opening + self.timing(part.seconds)
