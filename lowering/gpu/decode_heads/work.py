"""The work of the decode_heads kernels, which is counted in the same way for both compilers: one program per head."""

from __future__ import annotations

from lowering.gpu.address_decode.work import decode_operations


def operand_bytes(heads: int, order: int, sub_dim: int, width: int, size: int) -> int:
    """Return the bytes of the projected token and the outputs of all heads; an element has ``size`` bytes."""
    return heads * (2 * order * sub_dim + 2 * width) * size


def address_operations(lanes: int, order: int, sub_dim: int, top_k: int, unroll: int) -> int:
    """Count instructions that decode one head's addresses on ``lanes`` lanes, including idle ones."""
    return lanes * decode_operations(order, sub_dim, top_k, unroll)
