"""The time model's order of schedules against the measured one, as facts of a benchmark."""

from __future__ import annotations

from collections.abc import Sequence

from autotune.bench.correlation import rank_correlation
from autotune.bench.run import Run
from schedules.workload import Workload

FACT = "rank correlation of modelled and measured times"


def ops(run: Run, workloads: Sequence[Workload], seconds: float) -> None:
    """A fact for each workload that has an order to tell, and a notice with how many schedules were compared."""
    for i, workload in enumerate(workloads):
        run.on_step(f"rank correlation, {workload.op}")
        share = seconds / len(workloads)
        try:
            found = rank_correlation(run.target, workload, share)
        except (RuntimeError, ImportError) as problem:
            run.notice(f"{FACT}, {workload.name}: {problem}")
            continue
        if found.rho is not None:
            run.facts[f"{FACT}, {i + 1}. {workload.op}"] = found.rho
        run.notice(f"{FACT}, {i + 1}. {workload.name}: {found}")
