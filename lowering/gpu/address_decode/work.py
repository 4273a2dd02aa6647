"""The work of the address kernels, counted in the same way for both compilers: each thread handles one row."""

from __future__ import annotations

from lowering.gpu.resources import Work
from schedules.gpu.address import AddressDecode, AddressDecodeBackward


def decode(rows: int, order: int, sub_dim: int, top_k: int, size: int, schedule: AddressDecode) -> Work:
    """Count address_decode of ``rows`` of U = ``order`` sub-vectors of P = ``sub_dim`` logits of ``size`` bytes."""
    moved = rows * (order * sub_dim * size + top_k * (4 + size))
    return Work(
        programs=-(-rows // schedule.threads), threads=schedule.threads, dram_bytes=moved, cache_bytes=moved,
        # A loop loads the logits one sub-vector after another; straight code loads all of them first.
        steps=1 if schedule.unroll == 2 else order, iterations=decode_iterations(order, sub_dim, top_k),
    )  # fmt: skip


def decode_iterations(order: int, sub_dim: int, top_k: int) -> tuple[int, ...]:
    """Return the iterations of the loops over sub-vectors, each of which extends the beam of the one before; over
    digits; over rounds that sort the beam; and over the exchanges of a round."""
    rounds = (top_k - 1).bit_length()
    return order - 1, min(sub_dim, top_k) - 1, rounds, 1 << rounds >> 1


def backward(rows: int, order: int, sub_dim: int, top_k: int, size: int, schedule: AddressDecodeBackward) -> Work:
    """Count address_decode_backward; arguments as in ``decode``.

    TIR's kernel compares each address with each logit in two loops; Triton's has the first in straight code.
    """
    moved = rows * (2 * order * sub_dim * size + top_k * (4 + 2 * size))
    return Work(
        programs=-(-rows // schedule.threads), threads=schedule.threads, dram_bytes=moved, cache_bytes=moved,
        steps=order, iterations=(order, top_k, sub_dim) if schedule.compiler == "tir" else (order, sub_dim),
    )  # fmt: skip
