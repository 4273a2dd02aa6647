"""The report of a search: the front of time and loss as a table and a picture."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from rich.table import Table

from ramnet.console import duration
from ramnet.files import written_aside
from schedules.deployment import DeploymentRecord, Point, front


def table(record: DeploymentRecord, bandwidth: float) -> Table:
    """Return the front, the fastest point first. ``bandwidth`` is in bytes/s."""
    shown = Table(title="Deployments that no other one beats in both time and loss")
    for heading in ("", "deployment", "a token", "bytes", "over reading them", "loss"):
        shown.add_column(heading, justify="left" if heading in ("", "deployment") else "right")
    for point in record.front:
        shown.add_row(
            "→" if point == record.chosen else "", str(point.deployment), duration(point.seconds),
            f"{point.size / 1e6:.1f} MB", f"{point.seconds / (point.size / bandwidth):.2f}×", f"{point.loss:+.3%}",
        )  # fmt: skip
    return shown


def save(record: DeploymentRecord, points: Sequence[Point], bandwidth: float, picture: Path) -> None:
    """Draw every point, the front, the chosen point, and the time of reading each precision's weights."""
    from matplotlib.figure import Figure
    from matplotlib.ticker import EngFormatter, PercentFormatter

    figure = Figure(figsize=(8, 5), layout="constrained")
    axes = figure.subplots()
    precisions = list(dict.fromkeys(point.deployment.precision for point in points))
    for i, precision in enumerate(precisions):
        mine = [point for point in points if point.deployment.precision == precision]
        seconds, losses = [point.seconds for point in mine], [point.loss for point in mine]
        axes.scatter(seconds, losses, s=18, color=f"C{i}", label=precision, zorder=3)
        axes.axvline(mine[0].size / bandwidth, color=f"C{i}", linestyle=":", linewidth=1)
    best = front(points)
    axes.plot([p.seconds for p in best], [p.loss for p in best], color="0.5", linewidth=1, label="front", zorder=2)
    axes.scatter(
        [record.chosen.seconds],
        [record.chosen.loss],
        s=140,
        facecolors="none",
        edgecolors="black",
        label="chosen",
        zorder=4,
    )
    axes.axhline(record.most_loss, color="0.3", linestyle="--", linewidth=1, label="largest loss allowed")
    axes.set_xscale("log")
    axes.xaxis.set_major_formatter(EngFormatter("s"))
    axes.xaxis.set_minor_formatter(EngFormatter("s"))
    axes.tick_params(axis="x", which="both", labelsize=8)
    axes.yaxis.set_major_formatter(PercentFormatter(1, decimals=2))
    axes.set_xlabel("time of a token (dotted: reading its weights once)")
    axes.set_ylabel("loss, relative to float32")
    axes.set_title(f"judged by {record.judged_by}, on {record.device}", fontsize=9)
    axes.legend(fontsize=8)
    picture.parent.mkdir(parents=True, exist_ok=True)
    with written_aside(picture) as aside:
        figure.savefig(aside, dpi=120, format="png")
