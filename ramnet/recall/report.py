"""The results of the recall experiment as JSON, as a Markdown table and as two pictures."""

from __future__ import annotations

import json
from collections import defaultdict
from collections.abc import Mapping, Sequence
from pathlib import Path
from statistics import mean
from typing import Any

from ramnet.files import write_png, write_text_atomic
from ramnet.markdown import markdown_table
from ramnet.recall.plan import Scale
from ramnet.training.model import Config, state_size
from ramnet.training.sweep import Outcome, Sweep, by_name, remarks

FILES = TABLE, DATA, BY_STATE, BY_ORDER = "recall.md", "recall.json", "state.png", "order.png"
FAMILIES = {
    "RAM-Net": "RAM-Net", "linear": "linear attention", "gla": "GLA", "deltanet": "DeltaNet",
    "gated_deltanet": "Gated DeltaNet", "mamba2": "Mamba-2", "rwkv7": "RWKV-7", "window": "sliding window",
    "attention": "attention",
}  # fmt: skip
# Accuracies marked in the pictures. Those below the first or above the last are drawn there.
TICKS = (0.01, 0.03, 0.1, 0.3, 0.5, 0.7, 0.8, 0.9, 0.95, 0.98, 0.99, 0.995, 0.998, 0.999)


class Line:
    """A model's accuracies, means over its seeds.

    Attributes:
        name: as in ``plan.configurations``.
        family: a value of ``FAMILIES``.
        state: numbers that the model keeps of the longest example tested.
        accuracies: at each tested setting.
        spread: the largest distance of a seed's mean accuracy from that of all seeds; None for one seed.
        rate: the learning rate.
        seeds: how many they are.
    """

    def __init__(self, outcomes: Sequence[Outcome], config: Config, tokens: int) -> None:
        self.name = outcomes[0].name
        self.family = FAMILIES[self.name.split()[0]]
        self.config, self.state = config, state_size(config, tokens)
        self.accuracies = [mean(each) for each in zip(*(o.scores for o in outcomes), strict=True)]
        self.mean = mean(self.accuracies)
        self.seeds = len(outcomes)
        self.spread = max(abs(mean(o.scores) - self.mean) for o in outcomes) if self.seeds > 1 else None
        self.rate, self.seconds = outcomes[0].learning_rate, sum(o.seconds for o in outcomes)


def lines(outcomes: Sequence[Outcome], configs: Mapping[str, Config], scale: Scale) -> list[Line]:
    """Return a line for each model, the smallest state of each family first; ablations in their own order."""
    tokens = max(length for _, length in scale.tested)
    found = [Line(each, configs[name], tokens) for name, each in by_name(outcomes).items()]
    if scale.ablations:
        return found
    return sorted(found, key=lambda line: (list(FAMILIES.values()).index(line.family), line.state, line.name))


def save(outcomes: Sequence[Outcome], scale: Scale, sweep: Sweep, folder: Path) -> list[Path]:
    """Write a table, its data and, but for ablations, two pictures, each atomically. Returns their paths."""
    found = lines(outcomes, sweep.models, scale)
    write_text_atomic(folder / DATA, json.dumps([_facts(line) for line in found], indent=1) + "\n")
    below = remarks(sweep.models, len(sweep.seeds), outcomes)
    write_text_atomic(folder / TABLE, "\n\n".join([markdown(found, scale), *below]) + "\n")
    if scale.ablations:
        return [folder / name for name in (DATA, TABLE)]
    _draw_states(found, folder / BY_STATE)
    _draw_orders(found, folder / BY_ORDER)
    return [folder / name for name in (DATA, TABLE, BY_STATE, BY_ORDER)]


def _facts(line: Line) -> dict[str, object]:
    names = ("name", "family", "state", "accuracies", "mean", "spread", "rate", "seeds", "seconds")
    return {name: getattr(line, name) for name in names} | {"config": line.config.model_dump()}


def markdown(found: Sequence[Line], scale: Scale) -> str:
    """Return the table: accuracy at each setting, the best of four learning rates."""
    settings = (f"{pairs} pairs, {length}" for pairs, length in scale.tested)
    head = ["model", "state", *settings, "mean", "±", "rate", "seeds"]
    rows = [
        [line.name, str(line.state), *(f"{x:.3f}" for x in line.accuracies), f"{line.mean:.3f}",
         "" if line.spread is None else f"{line.spread:.3f}", f"{line.rate:g}", str(line.seeds)]
        for line in found
    ]  # fmt: skip
    return markdown_table(head, rows, numbers=True)


def _draw_states(found: Sequence[Line], picture: Path) -> None:
    """Draw mean accuracy against state size, the best order of each RAM-Net state (the paper's Figure 3)."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(8, 5), layout="constrained")
    axes = figure.subplots()
    for i, family in enumerate(FAMILIES.values()):
        best: dict[int, float] = {}
        for line in found:
            if line.family == family:
                best[line.state] = max(_drawn(line.mean), best.get(line.state, 0))
        style = {"linewidth": 2.5, "markersize": 8} if family == "RAM-Net" else {"linewidth": 1, "markersize": 5}
        if best:
            axes.plot(
                *zip(*sorted(best.items()), strict=True), marker="os^vDPX<>"[i], label=family, color=f"C{i}", **style
            )
    axes.set_xscale("log")
    axes.set_xlabel("state: numbers kept of the longest example")
    _measure_accuracy(axes)
    figure.legend(loc="outside right upper", fontsize=8)
    write_png(picture, figure)


def _draw_orders(found: Sequence[Line], picture: Path) -> None:
    """Draw mean accuracy against the order U for each number of slots M that has several (the paper's Figure 4)."""
    from matplotlib.figure import Figure

    points: dict[int, dict[int, float]] = defaultdict(dict)
    for line in found:
        if line.family == "RAM-Net":
            recall = line.config.layers[-1]  # type: ignore[union-attr]
            points[recall.slots][recall.order] = _drawn(line.mean)
    figure = Figure(figsize=(6, 4), layout="constrained")
    axes = figure.subplots()
    for slots, by_order in sorted(points.items()):
        if len(by_order) > 1:
            axes.plot(*zip(*sorted(by_order.items()), strict=True), marker="o", label=f"M = {slots}")
    axes.set_xlabel("order U of the address, at the same number of slots")
    _measure_accuracy(axes)
    if axes.lines:
        axes.legend(fontsize=8)
    write_png(picture, figure)


def _drawn(accuracy: float) -> float:
    return min(max(accuracy, TICKS[0]), TICKS[-1])


def _measure_accuracy(axes: Any) -> None:
    """Give the vertical axis a scale on which an error of 1 in 1000 is as far from 1 in 100 as that is from 1 in 10."""
    drawn = [accuracy for line in axes.lines for accuracy in line.get_ydata()]
    axes.set_ylabel("mean accuracy")
    axes.set_yscale("logit")
    axes.set_yticks(TICKS, [f"≤ {TICKS[0]:g}", *(f"{tick:g}" for tick in TICKS[1:-1]), f"≥ {TICKS[-1]:g}"])
    axes.minorticks_off()
    if drawn:
        odds = min(drawn) / (1 - min(drawn)) / 2, max(drawn) / (1 - max(drawn)) * 2
        axes.set_ylim(*(each / (1 + each) for each in odds))
    axes.grid(alpha=0.3)
