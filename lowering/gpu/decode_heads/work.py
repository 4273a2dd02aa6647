"""What the kernels of a layer's token do, whichever compiler made them: a program owns a head."""

from __future__ import annotations

from lowering.gpu.address_decode.work import decode_operations


def operand_bytes(heads: int, order: int, sub_dim: int, width: int, size: int) -> int:
    """Of the projected token and the outputs of all heads, in numbers of ``size`` bytes."""
    return heads * (2 * order * sub_dim + 2 * width) * size


def address_operations(lanes: int, order: int, sub_dim: int, top_k: int, unroll: int) -> int:
    """Instructions of one head that find its addresses on so many lanes, each a query's or a key's, or idle."""
    return lanes * decode_operations(order, sub_dim, top_k, unroll)
