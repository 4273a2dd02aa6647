"""What the kernels of one token's write and read do, whichever compiler made them: a program owns a head."""

from __future__ import annotations


def operand_bytes(heads: int, top_k: int, width: int, size: int) -> int:
    """Of the addresses, values and outputs of all heads, in numbers of ``size`` bytes."""
    return heads * (2 * top_k * (4 + size) + 2 * width * size)


def state_bytes(heads: int, top_k: int, width: int, size: int) -> int:
    """Of rows and masses of all heads: those written are loaded and stored, those read are loaded."""
    return 3 * heads * top_k * (width + 1) * size


def operations(top_k: int, width: int) -> int:
    """Instructions of one head: 7 a channel of the K rows written and read."""
    return 7 * top_k * width
