"""The time model against measurements on the GPU that is here."""

from __future__ import annotations

from autotune.bench import correlated
from autotune.bench.gpu.run import GpuRun
from autotune.bench.run import Table
from ramnet.config import RamNetConfig
from schedules.of_model import of_model_on_gpu

# Of the part's time; the rest is for starting the processes that compile and measure.
SHARE = 0.7


def ops(run: GpuRun) -> list[Table]:
    """Facts of every op of "340m" in bfloat16, over as much of its space as the time allows. No table."""
    correlated.ops(run, of_model_on_gpu(RamNetConfig.preset("340m")), SHARE * run.seconds)
    return []
