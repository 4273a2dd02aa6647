"""A visit without a GPU: every part at sizes that Triton's interpreter, and TIR's loops on a CPU, run in seconds."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

from autotune.bench import correlation
from autotune.bench import run as bench_run
from autotune.bench.gpu import candidates, decode_step, scan, stages, training
from autotune.bench.gpu.run import GpuRun
from autotune.bench.run import Table
from autotune.measure import problems, timing
from autotune.measure.gpu_runner import GpuRunner
from autotune.measure.timing import Clock, HostClock, Timing, interleaved
from ramnet import RamNetConfig
from schedules.of_model import of_model_on_gpu
from schedules.workload import Workload

SIZES = scan.Sizes(batch=1, heads=2, tokens=1, top_k=2, order=2, sub_dim=4, dim=4)
CONFIG = RamNetConfig.model_validate(
    {"vocab_size": 11, "hidden_size": 16, "num_layers": 1, "num_heads": 2, "value_dim": 4, "order": 2, "sub_dim": 4,
     "top_k": 2, "intermediate_size": 8, "cape_full_layers": 0}
)  # fmt: skip


def parts() -> dict[str, Callable[[GpuRun], list[Table]]]:
    """Make this process's constants tiny, and return the parts whose sizes are arguments."""
    import lowering

    def tiny(name: str) -> RamNetConfig:
        return CONFIG

    shrunk: Any = RamNetConfig
    shrunk.preset = tiny
    candidates.workloads = workloads
    candidates.CORRELATED, candidates.TRIED = 3, 1
    stages.makes_runner = runner
    decode_step.FEW, training.CHECKED_TOKENS = 3, 3
    once: Any = shortly
    timing.SHORTEST_SAMPLE, bench_run.interleaved = 1e-6, once
    # TIR's backward takes half a minute to build for a CPU.
    scan.FORMS = ("slots",)  # type: ignore[assignment]
    # Of so few channels, bfloat16 exchanges many addresses.
    training.TOLERANCE = training.LOSS_TOLERANCE = 1.0
    correlation.ROUNDS = 3
    compiled: Any = lowering.compile
    lowering.compile = partial(compiled, backend="eager")
    capture: Any = {"capture": lambda call: call, "batch": 1}
    return {
        "scan": partial(scan.memory_scan, sizes=SIZES),
        "attention": partial(scan.lengths, sizes=SIZES, tokens=(3,)),
        "gla": partial(scan.beside_gla, sizes=SIZES),
        "decode": partial(decode_step.steps, **capture),
        "position": partial(decode_step.by_position, **capture),
        "training": partial(training.step, batch=2, tokens=3),
    }


def shortly(
    calls: Mapping[str, Callable[[], object]], rounds: int, seconds: float, *, clock: Clock | None = None
) -> dict[str, Timing]:
    """Time each call once."""
    return interleaved(calls, 1, 0.0, clock=clock)


def workloads() -> list[Workload]:
    """Return the ops that are measured: the quickest to interpret."""
    return [w for w in of_model_on_gpu(CONFIG, 1, 3, 1) if w.op in ("memory_step", "address_decode_backward")]


def runner() -> GpuRunner:
    """Create a worker's runner that interprets kernels."""
    os.environ["TRITON_INTERPRET"] = "1"
    problems.CHECKED_TOKENS, problems.CHECKED_ROWS, timing.SHORTEST_SAMPLE = 3, 2, 1e-6
    return GpuRunner(device="cpu", clock=HostClock(), capture=lambda call: call)
