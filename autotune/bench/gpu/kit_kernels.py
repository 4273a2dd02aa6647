"""The kit's binaries of TIR's kernels, and the modelled time of every schedule."""

from __future__ import annotations

import json
import os
import shutil
import stat
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any, NamedTuple

import click

from autotune.bench.gpu import smoke
from autotune.bench.gpu.scan import untuned
from autotune.model import gpu as time_model
from autotune.study.study import every_schedule
from lowering import cache
from lowering.fingerprint import package_versions
from lowering.gpu.kernels import plan
from lowering.gpu.offline import NoCompilerError, arguments, compile_for
from lowering.targets import gpu_of
from ramnet.config import RamNetConfig
from ramnet.files import write_text_atomic
from ramnet.processes import process_pool
from schedules import records
from schedules.base import Schedule
from schedules.of_model import of_model_on_gpu
from schedules.workload import Op, Workload

# Targets of one architecture, sm_90, which share binaries.
TARGETS = ("h100", "h200")
# B, H, T, K, M, D of the scans that tests/gpu runs: an even size and an odd one.
TESTED = ((1, 3, 4096, 8, 1024, 64), (1, 2, 4095, 7, 1000, 48))
TESTED_CONSTANTS = {"decay_power": 1.0, "eps": 1e-6, "proxy_eps": 0.01}
TYPES = ("bfloat16", "float32", "float16", "float64")

Modelled = dict[str, dict[str, float]]  # the seconds of a schedule, as JSON, by workload


def tuned_over() -> list[Workload]:
    """Return the workloads of the tuner."""
    return of_model_on_gpu(RamNetConfig.preset("340m"))


def others() -> Iterator[tuple[Workload, Any]]:
    """Yield workloads of the smoke test, and of tests and models in other types, with TIR's schedules for them."""
    for kernel in smoke.kernels():
        for workload in smoke.workloads(kernel.op):
            schedule = smoke.schedule(kernel, workload)
            if kernel.compiler == "tir" and schedule is not None:
                yield workload, schedule
    for workload in _typed():
        for target in TARGETS:
            chosen: Any = records.choose(workload, target, target).schedule
            if chosen.compiler == "tir" and chosen.refusal(workload) is None:
                yield workload, chosen
        if workload.op.startswith("memory_scan"):
            with suppress(ValueError):
                yield workload, untuned(workload, "shared")


def _typed() -> Iterator[Workload]:
    for dtype in TYPES:
        for workload in tuned_over():
            yield Workload.model_validate(workload.model_dump() | {"dtype": dtype})
        scans: tuple[Op, ...] = ("memory_scan", "memory_scan_backward")
        for batch, heads, *sizes in TESTED:
            for op in scans:
                constants = {k: v for k, v in TESTED_CONSTANTS.items() if k != "proxy_eps" or op.endswith("backward")}
                yield Workload.of(op, (batch * heads, *sizes), dtype, constants)


class Group(NamedTuple):
    """Schedules of a workload with the same binary, and whether their times are modelled."""

    workload: Workload
    schedules: list[Any]
    tuned: bool


class Done(NamedTuple):
    """The names of a group's binaries, the modelled seconds by target, and why a schedule was not compiled."""

    names: list[str]
    seconds: dict[str, Modelled]
    problems: list[str]


def groups() -> list[Group]:
    """Return all schedules to compile."""
    found: dict[tuple[str, str], Group] = {}
    modelled = [(workload, each) for workload in tuned_over() for each in every_schedule(workload, TARGETS[0])]
    for workload, schedule in (*modelled, *others()):
        knobs = {name: value for name, value in schedule.model_dump().items() if name != "heads"}
        tuned = any(workload.name == each.name for each in tuned_over())
        key = workload.name if tuned else workload.kernel_name, json.dumps(knobs)
        group = found.setdefault(key, Group(workload, [], tuned))
        if schedule not in group.schedules:
            group.schedules.append(schedule)
    return sorted(found.values(), key=lambda group: group.schedules[0].compiler != "tir")


def compiled(group: Group) -> Done:
    """Compile a group and model its times. Raises NoCompilerError if TVM, nvcc or Triton is missing."""
    workload, gpu = group.workload, gpu_of(TARGETS[0])
    done = Done([], {target: {workload.name: {}} for target in TARGETS} if group.tuned else {}, [])
    for schedule in group.schedules:
        try:
            launches = compile_for(workload, TARGETS[0], schedule)
            if schedule.compiler == "tir":
                launch: Any = plan(workload.op, schedule, *arguments(workload)).launches[0]
                done.names.append(launch.kernels.file(gpu))
            for target, known in done.seconds.items():
                for launch in launches:
                    time_model.check(launch, gpu_of(target))
                terms = time_model.explain(launches, gpu_of(target))
                known[workload.name][schedule.model_dump_json()] = sum(term.seconds for term in terms)
        except NoCompilerError:
            raise
        except Exception as problem:  # noqa: BLE001 a compiler's errors; the other schedules are compiled
            done.problems.append(f"{workload.name}, {schedule}: {' '.join(str(problem).split())[:200]}")
    return done


def fill(folder: Path, modelled: Path, cache_folder: Path, jobs: int) -> None:
    """Write the binaries into ``folder`` and the modelled times into ``modelled``.

    What was compiled stays in ``cache_folder``, so that a second call compiles only what changed.

    Schedules that cannot be compiled, or do not fit on the GPU, are left out and printed. Raises NoCompilerError if
    TVM, nvcc or Triton is missing.
    """
    work = groups()
    seconds: dict[str, Modelled] = {target: {} for target in TARGETS}
    made: set[str] = set()
    problems: list[str] = []
    os.environ.pop("TRITON_INTERPRET", None)
    os.environ["RAMNET_CACHE"] = str(cache_folder)
    kept = cache_folder / "kernels"
    with process_pool(jobs) as pool:
        for number, done in enumerate(pool.map(compiled, work), start=1):
            made |= {*done.names}
            problems += done.problems
            for target, workloads in done.seconds.items():
                for name, known in workloads.items():
                    seconds[target].setdefault(name, {}).update(known)
            if number % 20 == 0 or number == len(work):
                click.echo(f"{number} of {len(work)} kernels compiled", err=True)
    for problem in problems:
        click.echo(f"left out: {problem}")
    click.echo(f"{len(made)} binaries of TIR's kernels")
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True, mode=stat.S_IRWXU)
    write_text_atomic(folder / cache.COMPILERS, json.dumps(package_versions("tir")))
    for name in sorted({*made, *(f"{name}.sha256" for name in made)}):
        shutil.copy(kept / name, folder / name)
    write_text_atomic(modelled, json.dumps(seconds))


def read(path: Path | None, target: str, workload: Workload) -> dict[Schedule, float]:
    """Return the modelled seconds of a workload's schedules from the kit's file; none if there is no such file."""
    if path is None or not path.is_file():
        return {}
    from schedules.kinds import schedule_of

    known: dict[str, float] = json.loads(path.read_text()).get(target, {}).get(workload.name, {})
    found: dict[Schedule, float] = {}
    for knobs, seconds in known.items():
        given: dict[str, Any] = json.loads(knobs)
        found[schedule_of(workload.op, target, given)] = seconds
    return found
