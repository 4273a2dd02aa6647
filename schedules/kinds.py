"""Which kind of schedule an op has on a target."""

from __future__ import annotations

from schedules import cpu, gpu
from schedules.base import Schedule


def table(target: str) -> dict[str, type[Schedule]]:
    """The kinds by op: a CPU's TIR kernels, or a GPU's Triton and TIR kernels."""
    return cpu.SCHEDULES if target == "cpu" else gpu.SCHEDULES


def kind(op: str, target: str) -> type[Schedule]:
    """The kind of schedule of ``op`` on ``target``; ValueError, listing what there is, for an op that it has not."""
    kinds = table(target)
    if op not in kinds:
        raise ValueError(f"{op} has no kernel for {target}; there are {', '.join(sorted(kinds))}")
    return kinds[op]
