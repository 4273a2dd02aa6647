"""The licence of the code in an export."""

from __future__ import annotations

import shutil
from importlib.metadata import files
from pathlib import Path

FILENAME = "LICENSE"


def copy(directory: Path) -> None:
    """Copy the project's licence, from the checkout or the installed package. Raises OSError if it is missing."""
    found = Path(__file__).parents[1] / FILENAME
    if not found.is_file():
        installed = [each for each in files("ramnet") or () if each.name == FILENAME]
        if not installed:
            raise OSError(f"{FILENAME} is missing from the installed package; install it again")
        found = Path(str(installed[0].locate()))
    shutil.copy(found, directory / FILENAME)
