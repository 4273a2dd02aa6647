"""A part of the benchmark in a process of its own: ``python -m autotune.bench.gpu.apart PART TARGET QUICK SECONDS``.

A kernel that hangs or faults takes its process with it, and no part finds memory that another has left in pieces.
"""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable
from dataclasses import asdict

from autotune.bench.gpu import correlated, decode, scan, spills, training, warm
from autotune.bench.gpu.run import GpuRun, reason
from autotune.bench.run import Row, Run, Table
from autotune.cuda_clock import CudaClock

# In the order in which they run, with the seconds that each may take.
PARTS: dict[str, tuple[Callable[[GpuRun], list[Table]], float]] = {
    "scan": (scan.memory_scan, 100),
    "attention": (scan.lengths, 100),
    "position": (decode.by_position, 90),
    "peers": (warm.peers, 120),
    "gla": (scan.beside_gla, 120),
    "decode": (decode.steps, 150),
    "training": (training.step, 200),
    "spills": (spills.shipped, 60),
    "correlation": (correlated.ops, 180),
}


def measured(run: Run, part: str, seconds: float) -> list[Table]:
    """The tables of a part; facts and notices go to ``run``. RuntimeError, with the last line it said, where it fails.

    Args:
        seconds: that it may take.
    """
    command = [sys.executable, "-m", "autotune.bench.gpu.apart", part, run.target, str(int(run.quick)), str(seconds)]
    try:
        done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=seconds)
    except subprocess.TimeoutExpired:
        raise RuntimeError(f"took longer than {seconds:.0f} s") from None
    if done.returncode:
        said = done.stderr.strip().splitlines() or [f"exit status {done.returncode}"]
        raise RuntimeError(said[-1])
    found = json.loads(done.stdout.splitlines()[-1])
    run.facts |= found["facts"]
    for text in found["notices"]:
        run.notice(text)
    return [Table(**{**table, "rows": [Row(**row) for row in table["rows"]]}) for table in found["tables"]]


def run_part(part: str, run: GpuRun) -> str:
    """What ``measured`` reads."""
    tables = PARTS[part][0](run)
    return json.dumps({"tables": [asdict(table) for table in tables], "facts": run.facts, "notices": run.notices})


def _main(part: str, target: str, quick: str, seconds: str) -> None:
    try:
        found = run_part(part, GpuRun(target, quick == "1", on_step=_say, clock=CudaClock(), seconds=float(seconds)))
    except Exception as problem:  # noqa: BLE001 the parent reads one line
        sys.exit(reason(problem))
    sys.stdout.write(found + "\n")


def _say(what: str) -> None:
    sys.stderr.write(f"{what}\n")


if __name__ == "__main__":
    _main(*sys.argv[1:])
