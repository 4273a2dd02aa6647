"""The rank correlation of modelled and measured times of schedules on this machine.

``python -m autotune.bench.correlation cpu 300`` prints it for every op of "340m" within 300 seconds; ``… cpu 300 1``
uses one thread, which is disturbed less on a busy machine.
"""

from __future__ import annotations

import random
import statistics
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from functools import cache, partial
from time import perf_counter
from typing import NamedTuple

import click

from autotune.bench.run import Run
from autotune.measure.timing import Timing
from autotune.study.study import every_schedule
from autotune.study.worker import FailedError, Worker
from ramnet.cli import main
from schedules.base import Schedule
from schedules.kinds import default_schedule
from schedules.workload import Workload

# Candidates that are interleaved with the default at a time, few enough to share the caches, and their rounds.
BATCH, ROUNDS, BATCH_SECONDS = 8, 16, 3.0
# There is no order to predict unless two halves of the rounds have at least this rank correlation, and the slowest
# tenth of the schedules takes at least this many times as long as the fastest.
REPEATABLE, SPREAD = 0.7, 1.1
FEWEST = 5
FACT = "rank correlation of modelled and measured times"

Model = Callable[[Schedule], float]


class Pair(NamedTuple):
    """A schedule's modelled and measured times, relative to the default's; ``halves`` are of every other round.

    The measured time is that of the fastest round, since other load only adds to a time.
    """

    schedule: Schedule
    modelled: float
    measured: float
    halves: tuple[float, float]


class Correlation(NamedTuple):
    """``rho`` is Spearman's, between modelled and measured times; None if the measured ones have no clear order."""

    rho: float | None
    pairs: tuple[Pair, ...]
    agreement: float = 0.0  # the rho of two halves of the rounds, an upper bound for a model
    reason: str = ""  # why there is no rho

    def __str__(self) -> str:
        if self.rho is None:
            return f"{self.reason} ({len(self.pairs)} schedules)"
        return f"{self.rho:.2f} ({len(self.pairs)} schedules; two halves of the rounds agree to {self.agreement:.2f})"


def rank_correlation(
    target: str, workload: Workload, seconds: float, threads: int | None = None, *,
    known: Mapping[Schedule, float] | None = None, most: int | None = None, runner: Worker | None = None,
) -> Correlation:  # fmt: skip
    """Model and measure schedules of ``workload``, as many as ``seconds`` allow, in the order of ``drawn``.

    Args:
        target: "cpu", or the target of this machine's GPU.
        threads: of a CPU's kernels; None for torch's number of threads.
        known: modelled seconds; schedules that it does not have are modelled here.
        most: the most schedules besides the default.
        runner: runs the schedules; None starts a process for that.

    Raises:
        ValueError: if the target is not this machine.
        RuntimeError: if the default schedule fails.
    """
    default = default_schedule(workload, target)
    others = drawn(workload, target)[:most]
    pairs: list[Pair] = []
    begin = perf_counter()
    with ExitStack() as stack:
        model, runner = _prepared(target, workload, threads, stack, known or {}, runner)
        runner.open(workload, target)
        try:
            runner.try_out(default)
            modelled = model(default)
        except FailedError as failure:
            raise RuntimeError(f"{workload.name}: the default schedule fails: {failure}") from None
        for start in range(0, len(others), BATCH):
            if start and perf_counter() - begin > seconds:
                break
            batch = {}
            for schedule in others[start : start + BATCH]:
                try:
                    batch[schedule] = model(schedule)
                    runner.try_out(schedule)
                except FailedError:
                    batch.pop(schedule, None)
            pairs += _measured(runner, default, modelled, batch)
    return correlate(pairs)


def drawn(workload: Workload, target: str) -> list[Schedule]:
    """Return the schedules of a workload except the default in a random order, which is always the same."""
    default = default_schedule(workload, target)
    others = [schedule for schedule in every_schedule(workload, target) if schedule != default]
    random.Random(0).shuffle(others)
    return others


def add_facts(
    run: Run, workloads: Sequence[Workload], seconds: float,
    correlated: Callable[[str, Workload, float], Correlation] = lambda *of: rank_correlation(*of),
    on_found: Callable[[], None] = lambda: None,
) -> None:  # fmt: skip
    """Add a fact for each workload whose schedules have a clear order, and a notice for each workload.

    ``on_found`` is called after each workload.
    """
    for i, workload in enumerate(workloads):
        run.on_step(f"rank correlation, {workload.op}")
        share = seconds / len(workloads)
        try:
            found = correlated(run.target, workload, share)
        except (RuntimeError, ImportError) as problem:
            run.notice(f"{FACT}, {workload.name}: {problem}")
        else:
            if found.rho is not None:
                run.facts[f"{FACT}, {i + 1}. {workload.op}"] = found.rho
            run.notice(f"{FACT}, {i + 1}. {workload.name}: {found}")
        on_found()


def correlate(pairs: Sequence[Pair]) -> Correlation:
    """Return Spearman's rho of the pairs, or the reason why there is none."""
    if len(pairs) < FEWEST:
        return Correlation(None, tuple(pairs), reason=f"fewer than {FEWEST} schedules ran")
    measured = sorted(pair.measured for pair in pairs)
    tenth = len(measured) // 10
    apart = measured[-1 - tenth] / measured[tenth]
    agreement = spearman([pair.halves[0] for pair in pairs], [pair.halves[1] for pair in pairs])
    if apart < SPREAD or agreement < REPEATABLE:
        return Correlation(
            None, tuple(pairs), agreement,
            f"no order to tell: the schedules are {apart:.2f}× apart, and two halves of the rounds agree to"
            f" {agreement:.2f}",
        )  # fmt: skip
    rho = spearman([pair.modelled for pair in pairs], [pair.measured for pair in pairs])
    return Correlation(rho, tuple(pairs), agreement)


def spearman(xs: Sequence[float], ys: Sequence[float]) -> float:
    """Return the rank correlation; equal values share their mean rank, and it is 0 if all are equal."""
    x, y = _ranks(xs), _ranks(ys)
    if len(set(x)) < 2 or len(set(y)) < 2:
        return 0.0
    return statistics.correlation(x, y)


def _ranks(values: Sequence[float]) -> list[float]:
    order = sorted(range(len(values)), key=lambda i: values[i])
    ranks = [0.0] * len(values)
    start = 0
    while start < len(order):
        end = start
        while end + 1 < len(order) and values[order[end + 1]] == values[order[start]]:
            end += 1
        for i in order[start : end + 1]:
            ranks[i] = (start + end) / 2
        start = end + 1
    return ranks


def _measured(runner: Worker, default: Schedule, modelled: float, batch: dict[Schedule, float]) -> list[Pair]:
    """Measure each candidate's time relative to the default's in the same rounds."""
    names = {str(i): schedule for i, schedule in enumerate(batch)}
    if not names:
        return []
    try:
        timings = runner.measure({"default": default, **names}, ROUNDS, BATCH_SECONDS)
    except FailedError:
        return []

    def over_default(timing: Timing, rounds: slice) -> float:
        return min(timing.samples[rounds]) / min(timings["default"].samples[rounds])

    return [
        Pair(schedule, batch[schedule] / modelled, over_default(timings[name], slice(None)),
             (over_default(timings[name], slice(0, None, 2)), over_default(timings[name], slice(1, None, 2))))
        for name, schedule in names.items()
    ]  # fmt: skip


def _prepared(
    target: str, workload: Workload, threads: int | None, stack: ExitStack, known: Mapping[Schedule, float],
    runner: Worker | None,
) -> tuple[Model, Worker]:  # fmt: skip
    """Return the function from a schedule to modelled seconds, and the worker that runs schedules."""
    if target == "cpu":
        import torch

        from autotune.model import cpu as time_model_cpu

        used = threads or torch.get_num_threads()
        model = partial(time_model_cpu.seconds, workload, machine=time_model_cpu.this_machine(used))
        return model, stack.enter_context(Worker(used))
    from autotune.measure.gpu_runner import GpuRunner
    from autotune.model.prediction import Predictor
    from lowering.targets import here

    if runner is None:
        found = here()
        if found is None or found.name != target:
            raise ValueError(f"{target} is not here; {'there is no GPU' if found is None else f'{found.name} is'}")
    predictor = stack.enter_context(Worker(1, makes=Predictor))
    runner = runner or stack.enter_context(Worker(1, makes=GpuRunner))

    @cache
    def opened() -> Worker:
        predictor.open(workload, target)
        return predictor

    def model_gpu(schedule: Schedule) -> float:
        return known[schedule] if schedule in known else opened().predict(schedule).seconds

    return model_gpu, runner


@click.command()
@click.argument("target")
@click.argument("seconds", type=float, default=300.0)
@click.argument("threads", type=click.IntRange(min=1), required=False)
def correlation(target: str, seconds: float, threads: int | None) -> None:
    """Print how well the model orders the schedules of each op of "340m" on TARGET, within SECONDS."""
    from autotune.study.search import Budget
    from lowering.targets import find
    from ramnet.config import RamNetConfig
    from schedules.of_model import of_model, of_model_on_gpu

    Budget(seconds, None)  # checks the seconds
    config = RamNetConfig.preset("340m")
    workloads = of_model(config) if find(target).gpu is None else of_model_on_gpu(config)
    for workload in workloads:
        found = rank_correlation(target, workload, seconds / len(workloads), threads)
        click.echo(f"{workload.name}: {found}")


if __name__ == "__main__":
    main(correlation)
