"""The work of the memory_step kernels, which is counted in the same way for both compilers: one program per head."""

from __future__ import annotations


def operand_bytes(heads: int, top_k: int, width: int, size: int) -> int:
    """Return the bytes of the addresses, values and outputs of all heads; an element has ``size`` bytes."""
    return heads * (2 * top_k * (4 + size) + 2 * width * size)


def state_bytes(heads: int, top_k: int, width: int, size: int) -> int:
    """Return the bytes of rows and masses of all heads: those written are loaded and stored, those read are loaded."""
    return 3 * heads * top_k * (width + 1) * size
