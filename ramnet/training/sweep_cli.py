"""What the commands that compare models share."""

from __future__ import annotations

from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

if TYPE_CHECKING:
    from ramnet.training.sweep import Outcome, Sweep


def options(output: str) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    """Add the options ``--output``, with this default, ``--jobs`` and ``--kernels`` to a command."""
    every = (
        click.option("--output", type=click.Path(path_type=Path), default=output,
                     help="Folder of results. What is done there is not repeated."),
        click.option("--jobs", type=click.IntRange(min=1), default=_jobs,
                     show_default="one per core; 1 if there is a GPU, which all share",
                     help="Processes, one thread each."),
        click.option("--kernels", default=_kernels, show_default="gpu if there is one, else cpu",
                     help="Kernels of the memory ops: cpu, gpu or reference. With cpu, models are trained on the CPU."),
    )  # fmt: skip

    def decorate(command: Callable[..., Any]) -> Callable[..., Any]:
        for option in reversed(every):
            command = option(command)
        return command

    return decorate


def _jobs() -> int:
    import torch

    from ramnet.processes import usable_cores

    return 1 if torch.cuda.is_available() else usable_cores()


def _kernels() -> str:
    import torch

    return "gpu" if torch.cuda.is_available() else "cpu"


def check(output: Path, kernels: str, *names: str) -> None:
    """Raise click.ClickException, ImportError or ValueError if results could not be computed, drawn or written to the
    files ``names``."""
    from ramnet import ops
    from ramnet.training.checkpoint import check_writable

    with ops.using(kernels):  # which raises for an unknown name
        pass

    if find_spec("matplotlib") is None:
        raise click.ClickException("the pictures need matplotlib: pip install 'ramnet[tune]'")
    check_writable(output, *names)


def run(sweep: Sweep, output: Path, jobs: int, kernels: str) -> list[Outcome]:
    """Run a sweep and show its progress. Raises click.ClickException if every model diverged."""
    from rich.progress import MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

    from ramnet.console import console

    columns = (TextColumn("{task.description}"), MofNCompleteColumn(), TimeElapsedColumn())
    with Progress(*columns, console=console()) as bar:
        line = bar.add_task("runs", total=len(sweep))

        def done(outcome: Outcome) -> None:
            bar.advance(line)
            bar.update(line, total=max(len(sweep), bar.tasks[line].completed))
            found = "diverged" if outcome.metric is None else f"{sweep.task.metric} {outcome.metric:.3f}"
            scores = "".join(f" {score:.3f}" for score in outcome.scores)
            at = f"rate {outcome.learning_rate:g}, {outcome.steps} steps, seed {outcome.seed}"
            bar.console.print(f"{outcome.name}: {found} ({at}){scores}")

        outcomes = sweep.run(output, jobs, kernels, done)
    if not outcomes:
        raise click.ClickException("every model diverged at every rate that was tried, so there is nothing to compare")
    return outcomes
