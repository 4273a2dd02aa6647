"""Numbers as people read them."""

from __future__ import annotations


def duration(seconds: float) -> str:
    """Three digits and an SI unit."""
    for unit, factor in (("s", 1.0), ("ms", 1e3), ("µs", 1e6)):
        if seconds * factor >= 1:
            return f"{three_digits(seconds * factor)} {unit}"
    return f"{three_digits(seconds * 1e9)} ns"


def three_digits(number: float) -> str:
    """Three significant digits without an exponent."""
    return f"{number:.0f}" if number >= 100 else f"{number:#.3g}"
