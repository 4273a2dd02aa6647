"""Times of a model's memory ops in training, from the tuned records of this machine."""

from __future__ import annotations

import math
from typing import NamedTuple

from lowering.fingerprint import stale
from lowering.targets import cpu_name, here
from ramnet.config import RamNetConfig
from schedules.of_model import of_training
from schedules.records import How, Record, known
from schedules.workload import DYNAMIC_AXES, Workload


class MemoryOps(NamedTuple):
    """Seconds that the memory ops of all layers take.

    Attributes:
        forward, backward: of ``address_decode`` and ``memory_scan``, and of their gradients.
        device: what the records are of.
        how: "modelled, not run" if any of them is.
    """

    forward: float
    backward: float
    device: str
    how: How


def memory_ops(config: RamNetConfig, rows: int, length: int) -> MemoryOps:
    """Return the times for ``rows`` sequences of ``length`` tokens on this machine's GPU, or its CPU if it has none.

    An op's time is that of the record with the nearest numbers of rows and tokens, in proportion to them; all other
    sizes are the same. On a GPU, records are of values in bfloat16. An entry point of ``ramnet.step_times``.

    Raises:
        LookupError: if an op has no record of its sizes and its present code on this device.
    """
    gpu = here()
    device = cpu_name() if gpu is None else gpu.description
    every = known("cpu" if gpu is None else gpu.name)
    records = [r for r in every if (gpu is not None or r.device == device) and stale(r) is None]
    forward, backward = 0.0, 0.0
    how: How = "measured"
    for layer in config.layers:
        for workload in of_training(layer, rows, length, "float32" if gpu is None else "bfloat16"):
            found = _nearest(workload, records, device)
            seconds = found.tuned.median * _work(workload) / _work(found.workload)
            if workload.op.endswith("_backward"):
                backward += seconds
            else:
                forward += seconds
            how = found.how if found.how != "measured" else how
    return MemoryOps(forward, backward, device, how)


def _nearest(workload: Workload, records: list[Record], device: str) -> Record:
    found = [r for r in records if r.workload.kernel_name == workload.kernel_name]
    if not found:
        raise LookupError(f"there is no record of {workload.kernel_name} on {device}")
    return min(found, key=lambda r: (r.how != "measured", workload.distance(r.workload)))


def _work(workload: Workload) -> int:
    """Return the number of tokens of all heads, in which the op's time is linear."""
    return math.prod(size for axis, size in workload.shape.items() if axis in DYNAMIC_AXES)
