"""The parts of a visit that are no parts of the benchmark: correlation with the kit's model, tuning, and ncu."""

from __future__ import annotations

import csv
import io
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

from autotune.bench.correlation import Correlation, add_facts, rank_correlation
from autotune.bench.gpu import candidates, smoke
from autotune.bench.gpu.run import GpuRun
from autotune.bench.run import Table
from autotune.measure.gpu_runner import GpuRunner
from autotune.study import tuner
from autotune.study.search import Budget, Progress
from autotune.study.worker import Worker
from lowering.targets import device_of
from schedules import records
from schedules.workload import Workload

# The shares of a part's time for its measurements; the rest is for starting processes.
SHARE = 0.8
# Seconds that building or running a candidate may take.
LIMIT = 20.0
# The host's threads, which compute the results that kernels are checked against.
THREADS = 8
# What ncu reads of a kernel, and which of its numbers are shown.
SECTIONS = ("SpeedOfLight", "MemoryWorkloadAnalysis", "Occupancy", "WarpStateStats", "LaunchStats")
BYTES = ("dram__bytes_read.sum", "dram__bytes_write.sum")
SHOWN = (
    "gpu__time_duration.sum", *BYTES, "dram__throughput.avg.pct_of_peak_sustained_elapsed",
    "sm__throughput.avg.pct_of_peak_sustained_elapsed", "sm__warps_active.avg.pct_of_peak_sustained_active",
    "sm__maximum_warps_per_active_cycle_pct", "launch__registers_per_thread",
)  # fmt: skip
STALL = "smsp__average_warps_issue_stalled_"
PROFILED_OPS = 2

makes_runner: Callable[[], Any] = GpuRunner


def correlation(run: GpuRun) -> list[Table]:
    """Add the rank correlation of each op over ``candidates.CORRELATED`` schedules."""
    with Worker(THREADS, makes=makes_runner) as runner:

        def correlated(target: str, workload: Workload, seconds: float) -> Correlation:
            known = candidates.modelled(workload, target)
            most = candidates.CORRELATED
            return rank_correlation(target, workload, seconds, known=known, most=most, runner=runner)

        # A visit that is cut off keeps what was found of the ops before.
        add_facts(run, candidates.workloads(), SHARE * run.seconds, correlated, lambda: run.on_table(run))
    return []


def tune(run: GpuRun) -> list[Table]:
    """Tune by measurement, in the model's order first, into the records of ``RAMNET_RECORDS`` and a journal beside."""
    workloads = candidates.workloads()

    def progress(at: Progress) -> None:
        run.on_step(f"{at.workload.op}: {at.doing}, {at.trials} trials, {at.gain:.2f}× the default")

    first = {workload.name: candidates.best(workload, run.target) for workload in workloads}
    with Worker(THREADS, build_limit=LIMIT, run_limit=LIMIT, makes=makes_runner) as worker:
        results = tuner.tune(
            run.target, workloads, worker, journal=records.records_folder() / "journal.log",
            records_file=records.records_path(run.target), budget=Budget(SHARE * run.seconds), threads=THREADS,
            device="cpu" if run.device == "cpu" else device_of(run.target), on_progress=progress, first=first,
        )  # fmt: skip
    for result in results:
        record = result.record
        run.facts[f"tuned {record.workload.op}, times as fast as the default"] = record.gain
        run.notice(
            f"tuned {record.workload.op}: {1e6 * record.tuned.median:.1f} µs ± {1e6 * record.tuned.spread:.1f}, default"
            f" {1e6 * record.default.median:.1f} µs; {record.trials} trials, failures"
            f" {result.study.summary().failures}; {record.schedule()}"
        )
    return []


def ncu() -> str | None:
    """Return the path of NVIDIA's profiler for kernels, or None if it is not installed."""
    found = shutil.which("ncu")
    places = [*Path("/opt/nvidia/nsight-compute").glob("*/ncu"), *Path("/usr/local").glob("cuda*/bin/ncu")]
    return found or next((str(path) for path in sorted(places, reverse=True)), None)


def hottest(target: str) -> list[Workload]:
    """Return the workloads whose recorded schedules take longest."""
    seconds = {record.workload.op: record.tuned.median for record in records.known(target)}
    return sorted(candidates.workloads(), key=lambda w: -seconds.get(w.op, 0.0))[:PROFILED_OPS]


def profile(run: GpuRun) -> list[Table]:
    """Add notices of what ncu reads of the kernels of the ops that take longest."""
    program = ncu()
    if program is None:
        run.notice("ncu is not installed; no kernel was profiled")
        return []
    for workload in hottest(run.target):
        run.on_step(f"profiling {workload.op}")
        sections = [f"--section={name}" for name in SECTIONS]
        tail = [sys.executable, "-m", "autotune.bench.gpu.profiled", workload.op, run.target]
        common = ["--clock-control=none", "--profile-from-start=off", "--csv", "--page=raw", *sections]
        limit = SHARE * run.seconds / PROFILED_OPS
        for metrics in ([f"--metrics={','.join(BYTES)}"], []):  # without them, if this version has other names
            command = [program, *common, *metrics, *tail]
            try:
                done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=limit)
            except subprocess.TimeoutExpired:
                run.notice(f"ncu, {workload.op}: took longer than {limit:.0f} s")
                break
            sys.stderr.write(done.stdout + done.stderr)
            kernels = profiled(done.stdout)
            if kernels:
                for line in kernels:
                    run.notice(f"ncu, {workload.op}: {line}")
                break
            last = (done.stdout + done.stderr).strip().splitlines()
            run.notice(f"ncu, {workload.op}: read nothing; {last[-1][:200] if last else 'it printed nothing'}")
        run.on_table(run)
    return []


def profiled(printed: str) -> list[str]:
    """Return a line for each kernel in ncu's CSV: the numbers of ``SHOWN`` and the four most frequent stalls."""
    lines = printed.splitlines()
    start = next((i for i, line in enumerate(lines) if line.startswith('"ID"')), None)
    if start is None:
        return []
    units, *kernels = csv.DictReader(io.StringIO("\n".join(lines[start:]))) or [{}]
    found = []
    for row in kernels:
        parts = [f"{name} {row[name]} {units[name]}".strip() for name in SHOWN if row.get(name)]
        stalls = {
            name.removeprefix(STALL).partition("_per_issue")[0]: _number(value)
            for name, value in row.items()
            if name.startswith(STALL) and name.endswith("ratio") and value
        }
        most = sorted(stalls, key=lambda name: -stalls[name])[:4]
        parts.append("warps stalled per issue: " + ", ".join(f"{name} {stalls[name]:.2f}" for name in most))
        found.append(f"{row.get('Kernel Name', '?')}: {'; '.join(parts)}")
    return found


def _number(text: str) -> float:
    try:
        return float(text.replace(",", ""))
    except ValueError:
        return 0.0


STAGES: dict[str, Callable[[GpuRun], list[Table]]] = {
    "smoke": smoke.smoke, "candidates": candidates.compile_all, "ranks": correlation, "tune": tune, "ncu": profile,
}  # fmt: skip
