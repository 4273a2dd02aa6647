"""Where the commands print."""

from __future__ import annotations

import sys

from rich.console import Console


def console(stderr: bool = False) -> Console:
    """As wide as the terminal; 120 columns in a pipe or a file, where rich would take 80 and cut the tables.

    Brackets are text, as in a path or "ramnet[gpu]", no markup.
    """
    terminal = (sys.stderr if stderr else sys.stdout).isatty()
    return Console(stderr=stderr, width=None if terminal else 120, markup=False)
