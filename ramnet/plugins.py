"""Entry points of the other packages, also in a checkout that is not installed."""

from __future__ import annotations

import ast
import tomllib
from importlib.metadata import EntryPoint, entry_points
from importlib.util import find_spec
from pathlib import Path
from typing import Any

_HERE = Path(__file__).resolve().parents[1]
_PROJECT = _HERE / "pyproject.toml"
# These packages are in the same folder as ``ramnet``, whether installed or in a checkout.
_PACKAGES = ("schedules", "lowering", "autotune", "export")


def plugins(group: str) -> dict[str, EntryPoint]:
    """Return the entry points of ``group`` by name. A checkout's pyproject.toml overrides the installed ones."""
    found = {entry.name: entry for entry in entry_points(group=group)}
    declared = _declared().get(group, {})
    return found | {name: EntryPoint(name, value, group) for name, value in declared.items()}


def _declared() -> dict[str, dict[str, str]]:
    """Return the entry points of a checkout by group; none if the file there is another project's."""
    try:
        project = tomllib.loads(_PROJECT.read_text(encoding="utf-8")).get("project", {})
    except (OSError, ValueError):
        return {}
    return project.get("entry-points", {}) if project.get("name") == "ramnet" else {}


def load(entry: EntryPoint) -> Any:
    """Import what ``entry`` names. Raises ImportError, naming the file, if a user's file shadows a RAM-Net package."""
    for name in _PACKAGES:
        found = find_spec(name)
        if found is not None:
            # A namespace package, such as a folder without __init__.py, has no origin.
            places = [found.origin] if found.origin else found.submodule_search_locations or ()
            for place in places:
                if not Path(place).resolve().is_relative_to(_HERE / name):
                    raise ImportError(f"{place} hides the package {name!r} of RAM-Net: rename it or move it elsewhere")
    return entry.load()


def docstring(entry: EntryPoint) -> str:
    """Read the docstring of the function that ``entry`` names from its source, without importing it."""
    package, *parts = entry.module.split(".")
    found = find_spec(package)
    for folder in (found and found.submodule_search_locations) or ():
        file = Path(folder, *parts).with_suffix(".py")
        if file.is_file():
            for node in ast.parse(file.read_text(encoding="utf-8")).body:
                if isinstance(node, ast.FunctionDef) and node.name == entry.attr:
                    return ast.get_docstring(node) or ""
    return ""
