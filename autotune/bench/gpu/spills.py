"""The shipped schedules' spilled registers, as facts of a benchmark."""

from __future__ import annotations

from autotune.bench.gpu.run import GpuRun
from autotune.bench.run import Table
from autotune.model import spills


def shipped(run: GpuRun) -> list[Table]:
    """A fact for each architecture, over all shipped schedules; a notice for each schedule that spills. No table."""
    for arch in spills.ARCHITECTURES:
        run.on_step(f"compiling for {arch}")
        found = list(spills.spilled(arch))
        for each in found:
            if each.found is None:
                run.notice(f"{arch}, {each.workload.name}: spills not known; {each.reason}")
            elif each.found:
                run.notice(f"{arch}, {each.workload.name}: {each.found} bytes spilled; {each.schedule!r}")
        compiled = [each.found for each in found if each.found is not None]
        if compiled:
            run.facts[f"bytes of registers spilled by {len(compiled)} schedules for {arch}"] = float(sum(compiled))
    return []
