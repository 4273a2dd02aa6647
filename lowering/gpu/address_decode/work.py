"""The work of the address kernels, counted in the same way for both compilers: each thread handles one row."""

from __future__ import annotations

from lowering.gpu.resources import Work
from schedules.gpu.address import AddressDecode, AddressDecodeBackward, exchanges


def decode(rows: int, order: int, sub_dim: int, top_k: int, size: int, schedule: AddressDecode) -> Work:
    """Count address_decode of ``rows`` of U = ``order`` sub-vectors of P = ``sub_dim`` logits of ``size`` bytes."""
    moved = rows * (order * sub_dim * size + top_k * (4 + size))
    return Work(
        programs=-(-rows // schedule.threads), threads=schedule.threads, dram_bytes=moved, cache_bytes=moved,
        operations=rows * decode_operations(order, sub_dim, top_k, schedule.unroll),
        # A loop loads the logits one sub-vector after another; straight code loads all of them first.
        steps=1 if schedule.unroll == 2 else order,
    )  # fmt: skip


def decode_operations(order: int, sub_dim: int, top_k: int, unroll: int) -> int:
    """Count instructions per row: 6 per logit, and 5 per compare-exchange (a comparison, two selections of scores and
    two of labels)."""
    sorting, joining = exchanges(sub_dim, top_k, unroll)
    return 5 * (order * sorting + (order - 1) * joining) + 6 * order * sub_dim + 3 * top_k


def backward(rows: int, order: int, sub_dim: int, top_k: int, size: int, schedule: AddressDecodeBackward) -> Work:
    """Count address_decode_backward; arguments as in ``decode``."""
    moved = rows * (2 * order * sub_dim * size + top_k * (4 + 2 * size))
    return Work(
        programs=-(-rows // schedule.threads), threads=schedule.threads, dram_bytes=moved, cache_bytes=moved,
        # A logit takes 10 instructions, and 3 for each address: a comparison, a selection and a sum. A digit takes 5.
        operations=rows * order * (sub_dim * (10 + 3 * top_k) + 5 * top_k), steps=order,
    )  # fmt: skip
