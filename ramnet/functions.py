"""``ramnet.compile``, ``use``, ``tune`` and ``export_onnx``: entry points of the packages that do the work.

``ramnet`` imports none of these packages, and they import ``ramnet``.
"""

from __future__ import annotations

from typing import Any

from ramnet.plugins import load, plugins


def __getattr__(name: str) -> Any:
    found = {} if name.startswith("__") else plugins("ramnet.functions")
    if name not in found:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return load(found[name])
