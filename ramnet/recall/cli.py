"""``ramnet recall``: the recall experiment of the paper."""

from __future__ import annotations

import os
from importlib.util import find_spec
from pathlib import Path

import click


@click.command()
@click.option("--scale", type=click.Choice(["quick", "day", "paper"]), default="quick", help="How much is trained.")
@click.option("--output", type=click.Path(path_type=Path), default="runs/recall",
              help="Folder of results. What is done there is not repeated.")  # fmt: skip
@click.option("--jobs", type=click.IntRange(min=1), default=os.cpu_count() or 1, help="Processes, one thread each.")
@click.option("--kernels", default="cpu", help="Kernels of the memory ops: cpu (tuned, TVM) or reference.")
def recall(scale: str, output: Path, jobs: int, kernels: str) -> None:
    """Compare RAM-Net's recall with other mixers by state size, and by the order of its addresses."""
    from rich.progress import MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

    from ramnet.console import console
    from ramnet.recall import report
    from ramnet.recall.plan import SCALES, configurations
    from ramnet.recall.sweep import Outcome, count, sweep
    from ramnet.training.checkpoint import check_writable

    if find_spec("matplotlib") is None:
        raise click.ClickException("the pictures need matplotlib: pip install 'ramnet[tune]'")
    plan, screen = SCALES[scale], console()
    check_writable(output)
    columns = (TextColumn("{task.description}"), MofNCompleteColumn(), TimeElapsedColumn())
    with Progress(*columns, console=screen) as bar:
        line = bar.add_task("runs", total=count(plan))

        def done(outcome: Outcome) -> None:
            bar.advance(line)
            shown = " ".join(f"{x:.3f}" for x in outcome.accuracies)
            bar.console.print(f"{outcome.name}  rate {outcome.learning_rate:g}  {outcome.steps} steps  {shown}")

        outcomes = sweep(plan, output, jobs, done, kernels)
    found = report.lines(outcomes, dict(configurations(plan)), plan)
    for path in report.save(found, plan, output):
        screen.print(str(path))
