"""Finding the best schedule of each workload for a target, within a budget."""

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
) -> list[Result]:
    """Search each workload, and merge its record when it is found: what ends the run loses none of those before.

    The time is shared out by the workloads' parts of the model's time; what one leaves goes to the next, and a workload
    for which there is none has no result. Searches in ``journal``
    on the same device with as many threads and the same kernels go on where they stopped. The known record's schedule,
    or without one the default, is compared with what is found, and stays unless another one was faster than it in three
    of four rounds of the final comparison; or, modelled, by more than the model can tell. A record that cannot be
    compared, for want of its compiler, stays as it is.

    Args:
        worker: builds, checks and times candidates; where ``modelled`` it compiles them for the target and predicts.
        calls: how often the model calls each workload; see ``autotune.study.shares``.
        begin: when the budget's seconds began, by ``perf_counter``; now if not given.
        device: the name of what runs; this machine's processor, or, modelled, the target's own name, if not given.

    Raises:
        ValueError: for an unknown target, a file that is no journal or no record file.
        OSError: where the journal or the records cannot be written; before the search, like all but the next.
        RuntimeError: where the default itself does not run or computes wrong numbers, or a finalist fails when it
            is measured anew; modelled, where the default cannot be compiled and where no schedule is fit.
        ImportError: for what is missing, with its install line.
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
        Study(journal, w, name, f"{where} | {fingerprint(w.op, name, how=kind.how)}", sampler, seed, storage=storage)
        for w in workloads
    ]
    results: list[Result] = []
    end = None if budget.seconds is None else (perf_counter() if begin is None else begin) + budget.seconds

    def in_all(progress: Progress) -> None:
        left = None if end is None else max(0.0, end - perf_counter())
        on_progress(replace(progress, seconds_left=left))

    names = [workload.name for workload in workloads]
    parts = shares(workloads, known, calls)
    order = list(range(len(studies)))
    if end is not None:  # where the time is too short for all, those of least account go without
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
        study.begin(*displaced)
        try:
            result = search.run(device)
        except OutOfTimeError:
            continue
        stays = not {*displaced} <= result.compared
        stays = stays or bool(records.merge(records_file, [result.record], result.compared))
        results.append(replace(result, kept=stays))
    return sorted(results, key=lambda result: names.index(result.record.workload.name))


def displaced_by(workload: Workload, known: Sequence[Record], target: str, device: str) -> list[Schedule]:
    """What a new record of ``workload`` would take the place of: the schedule of its record, and the one that kernels
    use for it here until then; without the default."""
    own = [r.schedule() for r in known if r.target == target and r.key == (workload.name, device)]
    used = records.choose(workload, target, device, lambda s: refused(s, workload, target), known).schedule
    default = default_schedule(workload, target)
    return [schedule for schedule in dict.fromkeys([*own, used]) if schedule != default]
