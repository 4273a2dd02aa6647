"""What the other packages contribute, by entry points: those of a checkout that is not installed too."""

from __future__ import annotations

import tomllib
from importlib.metadata import EntryPoint, entry_points
from pathlib import Path

_PROJECT = Path(__file__).parents[1] / "pyproject.toml"


def plugins(group: str) -> dict[str, EntryPoint]:
    """The entry points of ``group`` by name."""
    found = {entry.name: entry for entry in entry_points(group=group)}
    if not found and _PROJECT.is_file():
        declared = tomllib.loads(_PROJECT.read_text(encoding="utf-8"))["project"]["entry-points"].get(group, {})
        found = {name: EntryPoint(name, value, group) for name, value in declared.items()}
    return found
