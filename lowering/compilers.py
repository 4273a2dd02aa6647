"""Finds the compilers of C++ on this machine."""

from __future__ import annotations

import os
import shlex
import shutil


def cxx(*others: str) -> list[str] | None:
    """Return the command of the first compiler that is installed: that in CXX, which may have options, or else one of
    ``others``; None if none is."""
    for program, *options in filter(None, (_named(), *([each] for each in others))):
        if (path := shutil.which(program)) is not None:
            return [path, *options]
    return None


def _named() -> list[str]:
    """Return the command in CXX, or the path of a program if its name has spaces; empty if it is not set."""
    given = os.environ.get("CXX", "")
    if shutil.which(given):
        return [given]
    try:
        return shlex.split(given)
    except ValueError:  # an open quotation mark, which is no command
        return []
