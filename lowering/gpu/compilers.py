"""Whether Triton compiles kernels in this process, or interprets them."""

from __future__ import annotations

import os


def interpreted() -> bool:
    """Return whether Triton's interpreter runs kernels, one program after another (TRITON_INTERPRET=1)."""
    return os.environ.get("TRITON_INTERPRET", "").lower() in ("1", "true", "yes", "on", "y")
