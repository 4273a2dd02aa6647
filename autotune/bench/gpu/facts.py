"""Facts of a benchmark besides its tables: the rank correlation of the time model, and spilled registers."""

from __future__ import annotations

from autotune.bench.correlation import add_facts
from autotune.bench.gpu.run import GpuRun
from autotune.bench.run import Table
from autotune.model import spills
from ramnet.config import RamNetConfig
from schedules.of_model import of_model_on_gpu

# The share of the part's time that is measured; the rest is for starting processes.
SHARE = 0.7


def correlation(run: GpuRun) -> list[Table]:
    """Add the rank correlation of every op of "340m" in bfloat16, over as many schedules as the time allows."""
    add_facts(run, of_model_on_gpu(RamNetConfig.preset("340m")), SHARE * run.seconds)
    return []


def spilled_registers(run: GpuRun) -> list[Table]:
    """Add a fact for each architecture, over all shipped schedules, and a notice for each schedule that spills."""
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
