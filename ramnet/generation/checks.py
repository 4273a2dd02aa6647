"""Settings, refused where they enter in one sentence that names the value."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any


def check(name: str, value: object, kind: type, fits: Callable[[Any], bool], must: str) -> None:
    """TypeError where ``value`` is no ``kind``, of ``numbers``; ValueError where it does not fit."""
    if isinstance(value, bool) or not isinstance(value, kind):
        raise TypeError(f"{name} is {value!r}; it must be {must}")
    if not fits(value):
        raise ValueError(f"{name} is {value}; it must be {must}")
