"""The work of the decode_heads kernels, which is counted in the same way for both compilers: one program per head."""

from __future__ import annotations


def operand_bytes(heads: int, order: int, sub_dim: int, width: int, size: int) -> int:
    """Return the bytes of the projected token and the outputs of all heads; an element has ``size`` bytes."""
    return heads * (2 * order * sub_dim + 2 * width) * size
