"""``ramnet.compile``, ``use``, ``tune`` and ``export_onnx``, loaded through the entry points ``ramnet.functions``.

The packages that implement them import ``ramnet``, so ``ramnet`` does not import them.
"""

from __future__ import annotations

from typing import Any

from ramnet.plugins import load, plugins


def __getattr__(name: str) -> Any:
    found = {} if name.startswith("__") else plugins("ramnet.functions")
    if name not in found:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return load(found[name])
