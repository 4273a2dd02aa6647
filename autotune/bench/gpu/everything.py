"""The parts of a GPU's benchmark in order, each in a separate process, within a time limit."""

from __future__ import annotations

import importlib.metadata
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from time import perf_counter

from autotune.bench.gpu import part_process
from autotune.bench.gpu.goals import goals
from autotune.bench.gpu.run import reason
from autotune.bench.report import Report, machine
from autotune.bench.run import Run, Table
from lowering import targets

# The limit for all parts. A part leaves its unused time to the next; parts that would start later are omitted.
SECONDS = 480.0
PEERS = ("triton", "flash-linear-attention", "fla-core")


def check_target(name: str) -> None:
    """Raise RuntimeError if this machine has no GPU, ValueError if its GPU is not that target."""
    targets.gpu_of(name)
    here = targets.here()
    if here is None:
        raise RuntimeError(f"bench measures, and there is no GPU here for target {name!r} to be measured on")
    if here.name != name:
        raise ValueError(f"target {name!r} is not this machine's GPU: that is {here.name} ({here.description})")


def check_parts(parts: Sequence[str]) -> None:
    """Raise ValueError, listing the known parts, for an unknown one."""
    unknown = [part for part in parts if part not in part_process.PARTS]
    if unknown:
        raise ValueError(f"part {unknown[0]!r} is unknown; there are {', '.join(part_process.PARTS)}")


def measure(
    run: Run, *, parts: Sequence[str] = (), seconds: float = SECONDS,
    measured: Callable[[Run, str, float], list[Table]] = part_process.measured,
) -> Iterator[Report]:  # fmt: skip
    """Yield a report after each of ``parts``, or of all. A part that fails becomes a table with the reason."""
    begin = perf_counter()
    tables: dict[str, Table] = {}
    for part in parts or part_process.PARTS:
        left = seconds - (perf_counter() - begin)
        run.on_step(f"{part}, {left:.0f} s left")
        try:
            if left < 0.02 * seconds:
                raise part_process.PartError(f"left out: {seconds:.0f} s had passed", [])
            found = measured(run, part, min(part_process.PARTS[part][1], left))
        except part_process.PartError as problem:
            what = "what is missing of the part" if problem.tables else "the whole part"
            found = [*problem.tables, Table(part, what, 1, "", [], {"all": reason(problem)})]
        run.facts[f"seconds that {part} took"] = perf_counter() - begin - (seconds - left)
        tables |= {table.name: table for table in found}
        yield Report(list(tables.values()), goals(tables, run.facts), run.facts, run.notices, described())


def described() -> dict[str, str | int]:
    """Describe the machine with its GPU, and the versions of the compared libraries."""
    import torch

    found = machine()
    if torch.cuda.is_available():
        found["gpu"] = torch.cuda.get_device_name()
        found["cuda"] = str(torch.version.cuda)
    for name in PEERS:
        with suppress(importlib.metadata.PackageNotFoundError):
            found[name] = importlib.metadata.version(name)
    return found
