"""Distributes the seconds of a tuning run over workloads by their shares of the model's time."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from math import prod

from schedules.records import Record
from schedules.workload import Workload

# The seconds of a call's overhead and of a product of its sizes, measured on two cores of an AMD EPYC. They are used
# for workloads without a record, and only their ratios matter.
CALL, UNIT = 1e-5, 1.7e-10
# A backward scan's time over the forward's.
BACKWARD = 5
TOKEN_OPS = ("memory_step", "decode_heads")


def shares(
    workloads: Sequence[Workload], known: Sequence[Record], calls: Mapping[str, int] | None = None
) -> list[float]:
    """Return each workload's share of the model's time; the shares add up to 1.

    Args:
        known: records, whose times are used; those of other workloads are estimated from their sizes.
        calls: how often the model calls each workload, by name. Without it, whole sequences take half of the model's
            time and single tokens the other half.
    """
    seconds = [expected(workload, known) for workload in workloads]
    if calls is not None:
        weights = [calls.get(workload.name, 1) * each for workload, each in zip(workloads, seconds, strict=True)]
    else:
        rows = {2 * workload.shape["N"] for workload in workloads if workload.op in TOKEN_OPS}
        of_token = [workload.op in TOKEN_OPS or workload.shape.get("R") in rows for workload in workloads]
        halves = [sum(each for each, of in zip(seconds, of_token, strict=True) if of == half) for half in (False, True)]
        weights = [each / halves[of] for each, of in zip(seconds, of_token, strict=True)]
    return [weight / sum(weights) for weight in weights]


def expected(workload: Workload, known: Sequence[Record]) -> float:
    """Return the seconds of a call from a record of the workload, or an estimate."""
    found = next((record.default.median for record in known if record.workload == workload), None)
    if found is not None:
        return found
    sizes = {axis: size for axis, size in workload.shape.items() if axis != "M"}  # a token touches K slots of M
    times = BACKWARD if workload.op == "memory_scan_backward" else 1
    return CALL + UNIT * times * prod(sizes.values())
