"""The report of a search: the front of time and loss as a table and a picture."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

from rich.table import Table

from ramnet.console import duration
from ramnet.files import write_png
from schedules.deployment import DeploymentRecord, Point, front


def table(record: DeploymentRecord, bandwidth: float) -> Table:
    """Return the front and the chosen point, the fastest first. ``bandwidth`` is in bytes/s."""
    # Measured once more, the chosen point may be slower than one that loses as little.
    points = sorted({*record.front, record.chosen}, key=lambda point: point.seconds)
    shown = Table(title="Deployments that no other one beats in both time and loss")
    for heading in ("", "deployment", "a token", "bytes", "over reading them", "loss"):
        shown.add_column(heading, justify="left" if heading in ("", "deployment") else "right")
    for point in points:
        shown.add_row(
            "→" if point == record.chosen else "", str(point.deployment), duration(point.seconds),
            megabytes(point.size), f"{point.seconds / (point.size / bandwidth):.2f}×", f"{point.loss:+.3%}",
        )  # fmt: skip
    return shown


def megabytes(size: int) -> str:
    return f"{size / 1e6:.{1 if size < 1e8 else 0}f} MB"


def save(
    record: DeploymentRecord, points: Sequence[Point], sizes: Mapping[str, int], bandwidth: float, picture: Path
) -> None:
    """Draw every point, the front, the chosen point, what it is compared with, and the floor of each precision.

    ``sizes`` are the bytes of weights that a token reads, by precision.
    """
    from matplotlib.figure import Figure
    from matplotlib.ticker import EngFormatter, LogLocator, PercentFormatter

    figure = Figure(figsize=(9, 5), layout="constrained")
    axes = figure.subplots()
    bottom = axes.get_xaxis_transform()
    for i, (precision, size) in enumerate(sizes.items()):
        mine = [point for point in points if point.deployment.precision == precision]
        label = precision if mine else None
        seconds, losses = [point.seconds for point in mine], [point.loss for point in mine]
        axes.scatter(seconds, losses, s=18, color=f"C{i}", label=label, zorder=3)
        axes.axvline(size / bandwidth, color=f"C{i}", linestyle=":", linewidth=1)
        axes.text(
            size / bandwidth, 0.98, f"{precision}, {megabytes(size)}", color=f"C{i}", fontsize=8, rotation=90,
            ha="right", va="top", transform=bottom,
        )  # fmt: skip
    best = front(points)
    axes.plot(
        [p.seconds for p in best],
        [p.loss for p in best],
        color="0.5",
        linewidth=1,
        drawstyle="steps-post",
        label="front",
        zorder=2,
    )
    axes.scatter(
        [record.chosen.seconds],
        [record.chosen.loss],
        s=140,
        facecolors="none",
        edgecolors="black",
        label="chosen",
        zorder=4,
    )
    if record.gain is not None:
        axes.scatter(
            [record.chosen.seconds * record.gain], [0], s=50, marker="x", color="black", label=record.gain_over
        )
    axes.axhline(record.most_loss, color="0.3", linestyle="--", linewidth=1, label="largest loss allowed")
    axes.set_xscale("log")
    axes.xaxis.set_major_formatter(EngFormatter("s"))
    axes.xaxis.set_minor_formatter(EngFormatter("s"))
    axes.xaxis.set_minor_locator(LogLocator(subs=(2, 5)))
    axes.tick_params(axis="x", which="both", labelsize=8)
    axes.yaxis.set_major_formatter(PercentFormatter(1, decimals=2))
    axes.set_xlabel("time of a token (dotted: the floor, reading its weights once)")
    axes.set_ylabel("loss, relative to float32")
    axes.set_title(f"judged by {record.judged_by}, on {record.device}", fontsize=9)
    figure.legend(fontsize=8, loc="outside right upper")
    picture.parent.mkdir(parents=True, exist_ok=True)
    write_png(picture, figure)
