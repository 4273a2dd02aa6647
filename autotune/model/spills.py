"""Compiles the shipped schedules of GPUs and reads from the binaries how many registers they spill.

``python -m autotune.model.spills`` prints them; no GPU is needed.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import NamedTuple

import click

from lowering.gpu.offline import NoCompilerError, compile_for
from lowering.gpu.resources import Compiled
from lowering.targets import TARGETS
from ramnet.cli import main
from ramnet.config import RamNetConfig
from schedules import records
from schedules.base import Schedule
from schedules.kinds import default_schedule
from schedules.of_model import of_model_on_gpu
from schedules.workload import Workload

ARCHITECTURES = ("sm_80", "sm_90")


class Spilled(NamedTuple):
    """A schedule's bytes of spilled registers per thread, over its launches; None, with a reason, if not compiled."""

    arch: str
    workload: Workload
    schedule: Schedule
    found: int | None
    reason: str = ""


def shipped(arch: str) -> list[tuple[str, Workload, Schedule]]:
    """Return (target, workload, schedule): records, and the defaults of the 340m model's ops without records."""
    found = []
    for target in (target.name for target in TARGETS.values() if target.gpu is not None and target.gpu.arch == arch):
        known = records.load(records.shipped_path(target))
        found += [(target, record.workload, record.schedule()) for record in known]
        recorded = {record.workload.op for record in known}
        found += [
            (target, workload, default_schedule(workload, target))
            for workload in of_model_on_gpu(RamNetConfig.preset("340m"))
            if workload.op not in recorded
        ]
    return found


def spilled(
    arch: str, compile_for: Callable[[Workload, str, Schedule], list[Compiled]] = compile_for
) -> Iterator[Spilled]:
    """Compile each shipped schedule of an architecture, once if several targets share it."""
    seen = set()
    for target, workload, schedule in shipped(arch):
        key = (workload.kernel_name, schedule)
        if key in seen:
            continue
        seen.add(key)
        try:
            launches = compile_for(workload, target, schedule)
        except NoCompilerError as problem:
            yield Spilled(arch, workload, schedule, None, str(problem))
        else:
            yield Spilled(arch, workload, schedule, sum(launch.resources.spilled for launch in launches))


@click.command()
def spills() -> None:
    """Print the bytes that each shipped schedule spills."""
    for arch in ARCHITECTURES:
        for found in spilled(arch):
            said = found.reason if found.found is None else f"{found.found} bytes spilled"
            click.echo(f"{arch}, {found.workload.name}: {said}")


if __name__ == "__main__":
    main(spills)
