"""Finds the best schedule of each workload for a target within a budget."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from time import perf_counter
from typing import Any

from autotune.study.analytical_search import AnalyticalSearch
from autotune.study.empirical_search import EmpiricalSearch
from autotune.study.journal import open_journal
from autotune.study.search import Budget, Progress, Result
from autotune.study.shares import shares
from autotune.study.study import Sampler, Study, refused
from autotune.study.worker import OutOfTimeError, Worker
from lowering import targets
from lowering.fingerprint import fingerprint
from ramnet.files import require_writable
from schedules import records
from schedules.base import Schedule
from schedules.kinds import default_schedule
from schedules.records import Record
from schedules.workload import Workload


def tune(  # noqa: PLR0913 - the settings of a run, each a keyword, as ``call.prepare`` checked them
    target: str,
    workloads: Sequence[Workload],
    worker: Worker,
    *,
    journal: Path,
    records_file: Path,
    budget: Budget,
    threads: int,
    device: str | None = None,
    modelled: bool = False,
    sampler: Sampler = "tpe",
    seed: int = 0,
    on_progress: Callable[[Progress], None] = lambda progress: None,
    calls: Mapping[str, int] | None = None,
    begin: float | None = None,
    first: Mapping[str, Sequence[Schedule]] | None = None,
) -> list[Result]:
    """Search each workload, and merge its record as soon as it is found.

    The time is distributed by the workloads' shares of the model's time. A workload leaves its unused time to the next,
    and one without time has no result. Searches in ``journal`` on the same device with the same number of threads and
    the same kernels are resumed. The known record's schedule, or the default without one, stays unless another schedule
    was faster in three of four rounds of the final comparison or, if modelled, by more than the model's accuracy. A
    record that cannot be compared, because its compiler is missing, stays.

    Args:
        worker: builds, checks and times candidates or, if ``modelled``, compiles them and predicts their times.
        calls: how often the model calls each workload; see ``autotune.study.shares``.
        first: schedules to try before those that the sampler draws, by the workload's name.
        begin: when the budget's seconds began, by ``perf_counter``; None for now.
        device: the name of the device; None for this machine's CPU or, if modelled, the target's name.

    Raises:
        ValueError: if the target is unknown, or a file is not a journal or not a record file.
        OSError: if the journal or the records cannot be written.
        RuntimeError: if the default fails or gives wrong results, or a finalist fails when it is measured again; if
            modelled, if the default cannot be compiled or no schedule can be used. All other errors are raised before
            the search.
        ImportError: if a package is missing, with its install command.
    """
    name = targets.find(target).name
    require_writable(journal, records_file)
    known = records.known(name, records_file)
    if modelled:
        device = name
        where = f"{name} | modelled, not run"
    else:
        device = device or targets.cpu_name()
        where = f"{device} | {threads} threads"
    kind: Any = AnalyticalSearch if modelled else EmpiricalSearch
    storage = open_journal(journal)
    studies = [
        Study(
            journal, w, name, f"{where} | {fingerprint(w.op, name, how=kind.how)}", sampler, seed,
            worker.longest_trial, storage,
        )
        for w in workloads
    ]  # fmt: skip
    results: list[Result] = []
    end = None if budget.seconds is None else (perf_counter() if begin is None else begin) + budget.seconds

    def in_all(progress: Progress) -> None:
        left = None if end is None else max(0.0, end - perf_counter())
        on_progress(replace(progress, seconds_left=left))

    names = [workload.name for workload in workloads]
    parts = shares(workloads, known, calls)
    order = list(range(len(studies)))
    if end is not None:  # if the time is too short for all, those with the smallest shares get none
        order.sort(key=lambda i: -parts[i])
    for place, i in enumerate(order):
        study, share = studies[i], None
        if end is not None:
            left = end - perf_counter()
            if left <= 0:
                break
            share = left * parts[i] / sum(parts[j] for j in order[place:])
        displaced = displaced_by(study.workload, known, name, device)
        search = kind(study, name, worker, share, budget.trials, in_all, displaced, end)
        study.begin(*displaced, *(first or {}).get(study.workload.name, ()))
        try:
            result = search.run(device)
        except OutOfTimeError:
            continue
        stays = not {*displaced} <= result.compared
        stays = stays or bool(records.merge(records_file, [result.record], result.compared))
        results.append(replace(result, kept=stays))
    return sorted(results, key=lambda result: names.index(result.record.workload.name))


def displaced_by(workload: Workload, known: Sequence[Record], target: str, device: str) -> list[Schedule]:
    """Return the schedules that a new record of ``workload`` would replace: that of its record, and the one that
    kernels currently use for it; without the default."""
    own = [r.schedule() for r in known if r.target == target and r.key == (workload.name, device)]
    used = records.choose(workload, target, device, lambda s: refused(s, workload, target), known).schedule
    default = default_schedule(workload, target)
    return [schedule for schedule in dict.fromkeys([*own, used]) if schedule != default]
