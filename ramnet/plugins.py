"""What the other packages contribute, by entry points: those of a checkout that is not installed too."""

from __future__ import annotations

import ast
import tomllib
from importlib.metadata import EntryPoint, entry_points
from importlib.util import find_spec
from pathlib import Path

_PROJECT = Path(__file__).parents[1] / "pyproject.toml"


def plugins(group: str) -> dict[str, EntryPoint]:
    """The entry points of ``group`` by name."""
    found = {entry.name: entry for entry in entry_points(group=group)}
    if not found and _PROJECT.is_file():
        declared = tomllib.loads(_PROJECT.read_text(encoding="utf-8"))["project"]["entry-points"].get(group, {})
        found = {name: EntryPoint(name, value, group) for name, value in declared.items()}
    return found


def docstring(entry: EntryPoint) -> str:
    """The docstring of the function that ``entry`` names, read from its source: nothing is imported for it."""
    package, *parts = entry.module.split(".")
    found = find_spec(package)
    for folder in (found and found.submodule_search_locations) or ():
        file = Path(folder, *parts).with_suffix(".py")
        if file.is_file():
            for node in ast.parse(file.read_text(encoding="utf-8")).body:
                if isinstance(node, ast.FunctionDef) and node.name == entry.attr:
                    return ast.get_docstring(node) or ""
    return ""
