"""Checks of options."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any


def check(name: str, value: object, kind: type, fits: Callable[[Any], bool], must: str) -> None:
    """Raise TypeError if ``value`` is not a ``kind`` of number, and ValueError if ``fits(value)`` is false."""
    if isinstance(value, bool) or not isinstance(value, kind):
        raise TypeError(f"{name} is {value!r}; it must be {must}")
    if not fits(value):
        raise ValueError(f"{name} is {value}; it must be {must}")
