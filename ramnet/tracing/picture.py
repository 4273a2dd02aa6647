"""Draws heads of a trace as PNG: slots over time (the paper's Figure 5), slot use, and the age of what is read."""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from ramnet.files import write_png
from ramnet.tracing.heads import HeadTrace

# Dark red and light green: they differ in lightness, too. The marks differ in shape, and the bars in direction.
WRITTEN, READ = "#8f0a12", "#1fa35c"
MOST_HEADS = 8  # in a picture
MOST_TOKENS = 1000  # on the time axis; of more, the marks would cover one another
MOST_LABELS = 80  # tokens that the time axis spells out
BINS = 64  # of the histogram of slot use


def save_picture(heads: Sequence[HeadTrace], labels: Sequence[str], path: Path) -> None:
    """Draw ``heads``, at most ``MOST_HEADS``, one below another, and write the PNG atomically.

    The slots over time are those of the first ``MOST_TOKENS`` tokens; their use and the ages are those of all.

    Args:
        labels: the text of each token. Up to ``MOST_LABELS`` are written below the time axis.

    Raises:
        OSError: if ``path`` cannot be written.
        ImportError: if matplotlib is not installed (``pip install 'ramnet[tune]'``).
    """
    from matplotlib.figure import Figure
    from matplotlib.layout_engine import ConstrainedLayoutEngine
    from matplotlib.lines import Line2D

    heads = heads[:MOST_HEADS]
    figure = Figure(figsize=(12, 0.9 + 2.1 * len(heads)), layout=ConstrainedLayoutEngine(h_pad=0.06))
    rows = figure.subplots(len(heads), 3, squeeze=False, sharey="none", width_ratios=[7, 1.4, 2.2])
    for (over_time, use, ages), head in zip(rows, heads, strict=True):
        last = head is heads[-1]
        _draw_time(over_time, head, labels, last)
        _draw_use(use, head, last)
        _draw_ages(ages, head, last)
    keys = [
        Line2D([], [], linestyle="", marker="s", color=WRITTEN, label="written"),
        Line2D([], [], linestyle="", marker="o", color=READ, markerfacecolor="none", markeredgewidth=1.5, label="read"),
    ]
    figure.legend(handles=keys, loc="outside upper left", ncols=2, fontsize=10, frameon=False)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Glyph")  # a character that the font lacks is drawn as a box
        write_png(path, figure, dpi=110)


def _draw_time(axes: Any, head: HeadTrace, labels: Sequence[str], last: bool) -> None:
    """Draw slots over time. Of few tokens, a mark's area is its weight; of many, its opacity is, as it is small."""
    everything, top_k = head.accesses.write_slots.shape
    tokens = min(everything, MOST_TOKENS)
    width = 7 * 72 / tokens  # points of a token
    time = np.arange(tokens).repeat(top_k)
    write_slots, write_weights, read_slots, read_weights = (x[:tokens].flatten().numpy() for x in head.accesses)
    if tokens <= MOST_LABELS:
        largest = min(10.0, width) ** 2
        axes.scatter(time, read_slots, 1.4 * largest * read_weights, facecolors="none", edgecolors=READ)
        axes.scatter(time, write_slots, 0.6 * largest * write_weights, WRITTEN, marker="s", linewidths=0)
    else:
        size = max(1.7, 0.8 * width) ** 2
        sides = ((read_slots, read_weights, READ, "o", 0.25), (write_slots, write_weights, WRITTEN, "s", -0.25))
        for slots, weights, colour, marker, beside in sides:
            opacity = np.minimum(1.4 * np.sqrt(weights), 1)
            axes.scatter(time + beside, slots, size, colour, marker=marker, alpha=opacity, linewidths=0)
    kind = "its addresses move with the position (CAPE)" if head.moves else "its addresses stay"
    axes.set_title(f"{head.name}: {kind}", fontsize=10, loc="left")
    axes.set_xlim(-1, tokens)
    axes.set_ylim(-0.02 * len(head.written) - 1, 1.02 * len(head.written))
    axes.set_ylabel("slot")
    if tokens <= MOST_LABELS:
        shown = [label.replace("\n", "↵").replace("\t", "⇥") for label in labels]
        rotation = 0 if max(map(len, shown)) == 1 else 90
        axes.set_xticks(range(tokens), shown, fontsize=7, family="monospace", rotation=rotation, parse_math=False)
        axes.tick_params(axis="x", length=0)
    if last:
        axes.set_xlabel("token" if tokens == everything else f"token (the first {tokens} of {everything})")
    _tidy(axes)


def _draw_use(axes: Any, head: HeadTrace, last: bool) -> None:
    """Draw the histogram of slot use: what was written to the left, what was read to the right."""
    slots = len(head.written)
    bins = min(slots, BINS)
    edges = np.linspace(0, slots, bins + 1)
    for weights, colour, sign in ((head.written, WRITTEN, -1), (head.read, READ, 1)):
        sums, _ = np.histogram(np.arange(slots), edges, weights=weights.numpy())
        axes.barh(edges[:-1], sign * sums / max(sums.sum(), 1e-30), np.diff(edges), align="edge", color=colour)
    axes.axvline(0, color="0.4", linewidth=0.6)
    axes.set_ylim(-0.02 * slots - 1, 1.02 * slots)
    axes.set_title(f"{head.share_used:.0%} of {slots} used", fontsize=10, loc="left")
    axes.set_yticks([])
    limit = max(map(abs, axes.get_xlim()))
    axes.set_xlim(-limit, limit)
    axes.set_xticks([-limit / 2, limit / 2], ["written", "read"], fontsize=8)
    axes.tick_params(axis="x", length=0)
    if last:
        axes.set_xlabel("share of the weight")
    _tidy(axes)


def _draw_ages(axes: Any, head: HeadTrace, last: bool) -> None:
    """Draw the share of what is read that is at most so old."""
    shares = head.ages.cumsum(0).numpy()
    # The last is repeated, so that its step is drawn, which may be the only one.
    axes.step(range(len(shares) + 1), [*shares, shares[-1]], where="post", color=READ, linewidth=2)
    axes.set_xscale("symlog", linthresh=1)
    axes.set_xlim(0, max(2, len(head.ages)))
    axes.set_ylim(0, 1.02)
    axes.yaxis.set_major_formatter(lambda y, _: f"{y:.0%}")
    axes.xaxis.set_major_formatter(lambda x, _: f"{x:.0f}")
    axes.set_title(head.age(), fontsize=10, loc="left")
    axes.set_ylabel("share of the reads", fontsize=8)
    axes.grid(alpha=0.3)
    if last:
        axes.set_xlabel("age in tokens, at most")
    _tidy(axes)


def _tidy(axes: Any) -> None:
    axes.spines[["top", "right"]].set_visible(False)
    axes.tick_params(labelsize=8)
