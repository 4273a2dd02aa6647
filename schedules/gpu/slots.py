"""Rules for the GPU scans that are parallel over slots."""

from __future__ import annotations

from typing import Any

from schedules.gpu.address import refuse_threads
from schedules.workload import Workload

# Accesses whose loads are under way together in a program.
BATCH = 8
# More channels would be loads of more than 16 bytes in float32.
CHANNELS = (1, 2, 4)
_MOST_ACCESSES = 2**31 - 2**16  # of a head: int32 numbers them


def refuse(workload: Workload, schedule: Any) -> str | None:
    """Why the slots form cannot be built with these knobs, in one sentence; None where it can."""
    piece, channels, held, dim = schedule.piece, schedule.channels, schedule.heads, workload.shape["D"]
    accesses = 2 * workload.shape["T"] * workload.shape["K"]
    if not BATCH <= piece <= 2**15 or piece % BATCH:
        return f"piece is {piece}; it must be a multiple of {BATCH} in {BATCH}..{2**15}"
    if channels not in CHANNELS:
        return f"channels is {channels}; it must be 1, 2 or 4"
    if refuse_heads(held):
        return refuse_heads(held)
    if accesses > _MOST_ACCESSES:
        return f"a head has 2·T·K = {accesses} accesses; form slots sorts at most {_MOST_ACCESSES}"
    numbers = dim * max(accesses // 2, workload.shape["M"])
    if numbers >= 2**31:
        return f"a head's rows have {numbers} numbers, of M·D or T·K·D; form slots numbers at most {2**31 - 1}"
    if schedule.threads * channels < dim:
        return f"threads · channels is {schedule.threads * channels}; a program holds a row, of D = {dim}, at least"
    return refuse_threads(schedule.threads)


def refuse_heads(held: int) -> str | None:
    """A sentence where the heads whose rows are kept at a time cannot be so many."""
    return None if held >= 0 else f"heads is {held}; it must be 0, for all, or how many heads' rows are kept at a time"
