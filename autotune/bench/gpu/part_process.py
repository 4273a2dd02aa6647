"""Runs a part of the benchmark, or of a visit, in a separate process, which is
``python -m autotune.bench.gpu.part_process PART TARGET QUICK SECONDS [DEVICE]``.

A kernel that hangs or faults ends only its part, and parts do not share fragmented memory.
"""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable
from dataclasses import asdict

from autotune.bench.gpu import decode_step, dry_run, facts, scan, training, warm
from autotune.bench.gpu.run import GpuRun, reason
from autotune.bench.gpu.stages import STAGES
from autotune.bench.run import Run, Table
from autotune.measure.cuda_clock import CudaClock

# The prefix of lines that ``measured`` reads.
MARK = "ramnet bench: "
# The parts in the order in which they run, with their time limits in seconds.
PARTS: dict[str, tuple[Callable[[GpuRun], list[Table]], float]] = {
    "scan": (scan.memory_scan, 100),
    "attention": (scan.lengths, 100),
    "position": (decode_step.by_position, 90),
    "peers": (warm.peers, 120),
    "gla": (scan.beside_gla, 120),
    "decode": (decode_step.steps, 150),
    "training": (training.step, 200),
    "spills": (facts.spilled_registers, 60),
    "correlation": (facts.correlation, 180),
}


class PartError(RuntimeError):
    """A part failed; ``tables`` are those that it had finished."""

    def __init__(self, why: str, tables: list[Table]) -> None:
        super().__init__(why)
        self.tables = tables


def measured(run: Run, part: str, seconds: float) -> list[Table]:
    """Run a part within ``seconds`` and return its tables; facts and notices are added to ``run``.

    Raises PartError, with the last line that it printed, if it fails.
    """
    arguments = (part, run.target, str(int(run.quick)), str(seconds))
    command = [sys.executable, "-m", "autotune.bench.gpu.part_process", *arguments]
    try:
        done = subprocess.run(command, capture_output=True, check=False, timeout=seconds)
    except subprocess.TimeoutExpired as late:
        why = f"took longer than {seconds:.0f} s; at last: {_last_line(late.stderr)}"
        raise PartError(why, read(run, late.stdout)) from None
    tables = read(run, done.stdout)
    if done.returncode:
        raise PartError(_last_line(done.stderr) or f"exit status {done.returncode}", tables)
    return tables


def tell(run: GpuRun) -> str:
    """Return the line of results that ``measured`` reads."""
    tables = [asdict(table) for table in run.tables]
    return MARK + json.dumps({"tables": tables, "facts": run.facts, "notices": run.notices})


def read(run: Run, output: bytes | None) -> list[Table]:
    """Read the last line that ``tell`` made, ignoring what libraries print."""
    lines = [line for line in (output or b"").decode(errors="replace").splitlines() if line.startswith(MARK)]
    if not lines:
        return []
    found = json.loads(lines[-1].removeprefix(MARK))
    run.facts |= found["facts"]
    for text in found["notices"]:
        run.notice(text)
    return [Table.from_json(table) for table in found["tables"]]


def _last_line(output: bytes | None) -> str:
    lines = (output or b"").decode(errors="replace").strip().splitlines()
    return lines[-1] if lines else ""


def _main(part: str, target: str, quick: str, seconds: str, device: str = "cuda") -> None:
    def say(run: GpuRun) -> None:
        sys.stdout.write(tell(run) + "\n")
        sys.stdout.flush()

    def step(what: str) -> None:
        sys.stderr.write(f"{what}\n")
        sys.stderr.flush()

    try:
        known = {name: measure for name, (measure, _) in PARTS.items()} | STAGES
        if device == "cpu":
            known |= dry_run.parts()
        clock = CudaClock() if device == "cuda" else None
        run = GpuRun(
            target, quick == "1", on_step=step, clock=clock, seconds=float(seconds), on_table=say, device=device
        )
        known[part](run)
    except Exception as problem:  # noqa: BLE001 the parent reads one line
        sys.exit(reason(problem))
    say(run)


if __name__ == "__main__":
    _main(*sys.argv[1:])
