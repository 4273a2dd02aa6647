"""The scans of form "shared": what their programs keep in shared memory, and the rules that refuse some schedules."""

from __future__ import annotations

from typing import Protocol

from schedules.workload import Workload

# Of one program, on the GPU that gives most; a target may give less.
MOST_SHARED = 227 << 10
# Operands that a thread holds in registers between their load and the chunk that they are for.
MOST_STAGED = 96
# Tokens in straight code: the reads of one overlap with the writes of the next.
UNROLL = 2
SLOT_LANES = (1, 2, 4, 8)
CHUNKS = (8, 16, 32, 64)


class Knobs(Protocol):
    """What the forward and the backward schedule share."""

    @property
    def tile(self) -> int: ...
    @property
    def slot_lanes(self) -> int: ...
    @property
    def chunk(self) -> int: ...


def word(workload: Workload) -> int:
    """Bytes of a number that sums are kept in."""
    return 8 if workload.dtype == "float64" else 4


def forward_bytes(workload: Workload, knobs: Knobs) -> int:
    """State and mass; two chunks of slots, weights, decays, factors and values; one of masses and of sums by thread."""
    K, M = workload.shape["K"], workload.shape["M"]
    size, tile, chunk = word(workload), knobs.tile, knobs.chunk
    operands = 2 * chunk * (K * (2 * 4 + 3 * size) + tile * size)
    return M * (tile + 1) * size + operands + chunk * (K + tile * knobs.slot_lanes) * size


def backward_bytes(workload: Workload, knobs: Knobs) -> int:
    """State and its gradient; a chunk of operands, of the rows replaced in it, of products and of sums by thread."""
    K, M = workload.shape["K"], workload.shape["M"]
    size, tile, chunk = word(workload), knobs.tile, knobs.chunk
    operands = K * (2 * 4 + 4 * size) + 2 * tile * size + K * tile * size
    products = 2 * K * (tile + 1) * size + tile * knobs.slot_lanes * size
    return 2 * M * tile * size + chunk * (operands + products)


def refuse_forward(workload: Workload, knobs: Knobs) -> str | None:
    """Why a program of the forward scan cannot be built, in one sentence."""
    threads = knobs.tile * knobs.slot_lanes
    K, chunk = workload.shape["K"], knobs.chunk
    staged = 4 * -(-chunk * K // threads) + -(-chunk * knobs.tile // threads) if threads > 0 else 0
    if staged > MOST_STAGED:
        return f"a thread would hold {staged} operands of a chunk of {chunk} tokens; {MOST_STAGED} are the most"
    return _refuse(workload, knobs) or refuse_bytes(forward_bytes(workload, knobs), MOST_SHARED)


def refuse_backward(workload: Workload, knobs: Knobs, checkpoint: int) -> str | None:
    """Why the backward scan cannot be built, in one sentence."""
    if knobs.chunk < 1 or checkpoint % knobs.chunk:
        return f"checkpoint is {checkpoint}; it must be a multiple of chunk = {knobs.chunk}"
    return _refuse(workload, knobs) or refuse_bytes(backward_bytes(workload, knobs), MOST_SHARED)


def refuse_bytes(needed: int, limit: int) -> str | None:
    """A sentence where a program needs more shared memory than there is."""
    return None if needed <= limit else f"a program needs {needed} bytes of shared memory; the limit is {limit}"


def _refuse(workload: Workload, knobs: Knobs) -> str | None:
    K, threads = workload.shape["K"], knobs.tile * knobs.slot_lanes
    if knobs.slot_lanes < 1 or K % knobs.slot_lanes:
        return f"slot_lanes is {knobs.slot_lanes}, which does not divide K = {K}"
    if not 1 <= threads <= 1024:
        return f"tile · slot_lanes is {threads}; a program has 1..1024 threads"
    good = knobs.chunk >= UNROLL and knobs.chunk % UNROLL == 0
    return None if good else f"chunk is {knobs.chunk}; it must be a positive multiple of {UNROLL}"
