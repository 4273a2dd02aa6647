"""What a benchmark tells beside its tables: how well the time model orders schedules, and the registers spilled."""

from __future__ import annotations

from autotune.bench.correlation import add_facts
from autotune.bench.gpu.run import GpuRun
from autotune.bench.run import Table
from autotune.model import spills
from ramnet.config import RamNetConfig
from schedules.of_model import of_model_on_gpu

# Of the part's time; the rest is for starting the processes that compile and measure.
SHARE = 0.7


def correlation(run: GpuRun) -> list[Table]:
    """Facts of every op of "340m" in bfloat16, over as much of its space as the time allows. No table."""
    add_facts(run, of_model_on_gpu(RamNetConfig.preset("340m")), SHARE * run.seconds)
    return []


def spilled_registers(run: GpuRun) -> list[Table]:
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
