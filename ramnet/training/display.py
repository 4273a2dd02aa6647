"""The progress line of training."""

from __future__ import annotations

from dataclasses import dataclass

from rich.console import Console
from rich.progress import BarColumn, Progress, TaskProgressColumn, TextColumn, TimeRemainingColumn


@dataclass
class Speed:
    """The speed of training since the last report.

    Attributes:
        of_token: operations of a token, without the output head.
        of_label: operations of the output head for a label.
        peak: operations per second that the machines can compute.
        since: seconds trained at the last report.
        tokens: tokens since then.
        labels: labels since then.
        text: tokens per second and the share of ``peak``, to be displayed.
    """

    of_token: int
    of_label: int
    peak: float
    since: float
    tokens: int = 0
    labels: int = 0
    text: str = ""

    def add(self, tokens: int, labels: int, elapsed: float) -> None:
        """Count what a step has trained on, after ``elapsed`` seconds of training."""
        self.tokens += tokens
        self.labels += labels
        passed = elapsed - self.since
        share = (self.of_token * self.tokens + self.of_label * self.labels) / passed / self.peak
        self.text = f"{self.tokens / passed:,.0f} tokens/s  {share:.1%} of peak"

    def restart(self, elapsed: float) -> None:
        """Begin to count again, after ``elapsed`` seconds of training."""
        self.since, self.tokens, self.labels = elapsed, 0, 0


def progress_bar(console: Console | None) -> Progress:
    """Return a bar whose tasks have the fields loss, speed, held_out and skipped; None displays nothing."""
    return Progress(
        TextColumn("{task.description}"),
        BarColumn(),
        TaskProgressColumn(),
        TextColumn("loss {task.fields[loss]:.3f} {task.fields[speed]} {task.fields[held_out]}{task.fields[skipped]}"),
        TimeRemainingColumn(),
        console=console or Console(quiet=True),
    )
