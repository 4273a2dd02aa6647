"""The progress line of a tuning run."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager

import rich.progress
from rich.console import Console

from autotune.study.search import Progress


@contextmanager
def shown(console: Console) -> Iterator[Callable[[Progress], None]]:
    """Yield a function that updates the progress line, which is not shown if ``console`` is not a terminal."""
    with rich.progress.Progress(
        rich.progress.SpinnerColumn(), rich.progress.TextColumn("{task.description}"),
        rich.progress.BarColumn(bar_width=16), rich.progress.MofNCompleteColumn(),
        rich.progress.TextColumn("{task.fields[state]}"), console=console, transient=True,
        disable=not console.is_terminal,
    ) as live:  # fmt: skip
        task = live.add_task("starting", total=None, state="")

        def update(progress: Progress) -> None:
            left = "" if progress.seconds_left is None else f" · {progress.seconds_left:.0f} s left"
            how = "" if progress.how == "measured" else f" · {progress.how}"
            state = f"best {progress.gain:.2f}× · {progress.failures} failed{left} · {progress.doing}{how}"
            live.update(
                task, description=progress.workload.op, completed=progress.trials, total=progress.most_trials,
                state=state,
            )  # fmt: skip

        yield update
