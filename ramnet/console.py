"""How the commands print."""

from __future__ import annotations

import sys

from rich.console import Console


def console(stderr: bool = False) -> Console:
    """Return a console as wide as the terminal; 120 columns in a pipe or a file, as rich's default of 80 cuts tables.

    Square brackets, as in "ramnet[gpu]", and names between colons are printed as they are.
    """
    terminal = (sys.stderr if stderr else sys.stdout).isatty()
    return Console(stderr=stderr, width=None if terminal else 120, markup=False, emoji=False)


def duration(seconds: float) -> str:
    """Format a duration with three digits and an SI unit."""
    for unit, factor in (("s", 1.0), ("ms", 1e3), ("µs", 1e6)):
        if seconds * factor >= 1:
            return f"{digits(seconds * factor)} {unit}"
    return f"{digits(seconds * 1e9)} ns"


def digits(number: float) -> str:
    """Format a number with three significant digits and no exponent."""
    return f"{number:.0f}" if number >= 100 else f"{number:#.3g}"
