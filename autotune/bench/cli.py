"""``ramnet bench``."""

from __future__ import annotations

import os
from pathlib import Path

import click


@click.command()
@click.option("--target", default="cpu", help="What the kernels are built for; it must be this machine.")
@click.option("--quick", is_flag=True, help="Fewer rounds and no torch.compile.")
@click.option(
    "--output", type=click.Path(file_okay=False, path_type=Path), default=Path("runs/bench"),
    help="Folder for bench.json and bench.png.",
)  # fmt: skip
@click.option(
    "--threads", type=click.IntRange(min=1), default=None,
    help="Threads of every table; by default 1 for the ops and all cores for the model.",
)  # fmt: skip
def bench(target: str, quick: bool, output: Path, threads: int | None) -> None:
    """Measure every op and the model: eager, torch.compile, plain C++, kernels, and the bandwidth floor.

    All figures are ratios within interleaved rounds, medians with interquartile ranges. Each form is checked against
    the reference before it is timed.
    """
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

    from autotune.bench import everything, report
    from autotune.bench.run import Run, keep_freed_memory
    from ramnet.console import console

    screen = console()
    # The progress goes to stderr, so that the tables alone can be piped on.
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    with Progress(*columns, console=console(stderr=True)) as progress:
        task = progress.add_task("starting", total=None)
        run = Run(target, quick, threads or 1, on_step=lambda what: progress.update(task, description=what))
        if not run.kernels:
            run.on_step("no kernels")
        # Before the measuring rather than after it, should it not be writable.
        output.mkdir(parents=True, exist_ok=True)
        if keep_freed_memory():
            run.notice("freed memory is kept for the next allocation, for every form alike")
        found = everything.measure(
            run, threads or os.cpu_count() or 1, lambda done, of: progress.update(task, completed=done, total=of)
        )
    paths = report.save(found, output)
    report.show(found, screen)
    screen.print(f"written: {', '.join(map(str, paths))}")
