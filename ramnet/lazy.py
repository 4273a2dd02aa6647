"""Packages whose attributes are imported on first use."""

from __future__ import annotations

import sys
from collections.abc import Callable, Mapping
from importlib import import_module
from importlib.util import find_spec
from pkgutil import iter_modules
from typing import Any


def attributes(package: str, homes: Mapping[str, str]) -> tuple[Callable[[str], Any], Callable[[], list[str]]]:
    """Return a package's ``__getattr__`` and ``__dir__``, which import its submodules and the names of ``homes``.

    Args:
        package: the name of the package.
        homes: the module that each public name is imported from.
    """

    def get(name: str) -> Any:
        if name in homes:
            found = getattr(import_module(homes[name]), name)
            setattr(sys.modules[package], name, found)
            return found
        if not name.startswith("_") and find_spec(f"{package}.{name}") is not None:
            return import_module(f"{package}.{name}")
        raise AttributeError(f"module {package!r} has no attribute {name!r}")

    def names() -> list[str]:
        here = sys.modules[package]
        return sorted({*vars(here), *homes, *(module.name for module in iter_modules(here.__path__))})

    return get, names
