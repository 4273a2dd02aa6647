"""The optional libraries of this package."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from contextlib import contextmanager
from importlib.util import find_spec


def need(*libraries: str, extra: str = "export") -> None:
    """Raise ImportError, with the install command, if a library is missing."""
    missing = [name for name in libraries if find_spec(name) is None]
    if missing:
        raise ImportError(f"{' and '.join(missing)} not found; install with: pip install 'ramnet[{extra}]'")


@contextmanager
def quiet(name: str) -> Iterator[None]:
    """Suppress a logger's warnings, which are about ops that the translation table replaces."""
    logger = logging.getLogger(name)
    before = logger.level
    logger.setLevel(logging.ERROR)
    try:
        yield
    finally:
        logger.setLevel(before)
