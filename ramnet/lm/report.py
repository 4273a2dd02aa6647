"""The results of the language-modelling experiment as JSON, as a Markdown table and as two pictures."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from statistics import mean
from typing import Any

from ramnet.files import write_png, write_text_atomic
from ramnet.lm.plan import MIXERS, Scale
from ramnet.markdown import markdown_table
from ramnet.training.metrics import losses
from ramnet.training.model import Config, parameter_count, state_size
from ramnet.training.sweep import Outcome, Sweep, by_name, remarks

FILES = TABLE, DATA, BY_STEP, BY_CONTEXT = "lm.md", "lm.json", "steps.png", "context.png"


class Line:
    """A model's results, means over its seeds, each with the largest distance of a seed from it; None for one seed.

    Attributes:
        seeds: how many they are.
        held_out: bits per byte of held-out windows.
        repeated: the same of repeated names.
        by_context: the same of fixed bytes, at the end of windows of the scale's contexts.
        state: numbers kept of as many bytes as the longest context.
        speed: tokens/s in training, one process on one thread beside the others.
    """

    def __init__(self, outcomes: Sequence[Outcome], config: Config, scale: Scale) -> None:
        self.name, self.config, self.rate = outcomes[0].name, config, outcomes[0].learning_rate
        self.parameters, self.state = parameter_count(config), state_size(config, scale.contexts[-1])
        self.seeds = len(outcomes)
        columns = [
            (mean(x), max(abs(each - mean(x)) for each in x) if self.seeds > 1 else None)
            for x in zip(*(o.scores for o in outcomes), strict=True)
        ]
        self.held_out, self.repeated, self.by_context = columns[0], columns[1], columns[2:]
        self.speed = mean(scale.steps * scale.batch_size * scale.length / o.seconds for o in outcomes)

    def facts(self, contexts: Sequence[int]) -> dict[str, Any]:
        """Return the line as JSON has it."""
        names = ("name", "parameters", "state", "held_out", "repeated", "speed", "rate", "seeds")
        return {
            **{name: getattr(self, name) for name in names},
            "by_context": dict(zip(map(str, contexts), self.by_context, strict=True)),
            "config": self.config.model_dump(mode="json"),
        }


def lines(outcomes: Sequence[Outcome], configs: Mapping[str, Config], scale: Scale) -> list[Line]:
    """Return a line for each model."""
    return [Line(each, configs[name], scale) for name, each in by_name(outcomes).items()]


def save(outcomes: Sequence[Outcome], scale: Scale, sweep: Sweep, folder: Path) -> list[Path]:
    """Write the four files, each atomically, and return their paths.

    Without the losses of any step, as in a folder of outcomes alone, there is no picture of them.
    """
    found = lines(outcomes, sweep.models, scale)
    facts = [line.facts(scale.contexts) for line in found]
    write_text_atomic(folder / DATA, json.dumps(facts, indent=1) + "\n")
    by_step = {line.name: each for line in found if (each := _losses(line, sweep, folder))}
    below = remarks(sweep.models, len(sweep.seeds), outcomes)
    missing = [line.name for line in found if line.name not in by_step]
    if missing:
        below.append(f"{BY_STEP} lacks {', '.join(missing)}, whose losses are not in this folder.")
    write_text_atomic(folder / TABLE, "\n\n".join([markdown(found, scale), *below]) + "\n")
    _draw_contexts(found, scale, folder / BY_CONTEXT)
    if by_step:
        _draw_steps(found, by_step, folder / BY_STEP)
    return [folder / name for name in (DATA, TABLE, *([BY_STEP] if by_step else []), BY_CONTEXT)]


def markdown(found: Sequence[Line], scale: Scale) -> str:
    """Return the table of bits per byte."""
    head = ["model", "parameters", "state", "held out", "repeated names",
            *(f"window {context}" for context in scale.contexts), "tokens/s", "rate", "seeds"]  # fmt: skip
    rows = [
        [line.name, f"{line.parameters}", f"{line.state}",
         *(f"{x:.3f}" + (f" ± {spread:.3f}" if spread is not None else "")
           for x, spread in (line.held_out, line.repeated, *line.by_context)),
         f"{line.speed:.0f}", f"{line.rate:g}", f"{line.seeds}"]
        for line in found
    ]  # fmt: skip
    return markdown_table(head, rows, numbers=True)


def _draw_contexts(found: Sequence[Line], scale: Scale, picture: Path) -> None:
    """Draw bits per byte of the same bytes against the size of the window that they end."""
    axes, figure = _axes("bytes of the window", "bits per byte")
    for i, line in enumerate(found):
        axes.plot(scale.contexts, [x for x, _ in line.by_context], marker="o", **_style(i, line.name))
    # A model that fails beyond the trained length leaves the picture; the table has its numbers.
    trained = [line.by_context[scale.contexts.index(scale.length)][0] for line in found]
    lowest, apart = min(x for line in found for x, _ in line.by_context), max(trained) - min(trained)
    axes.set_ylim(lowest - 0.1 * apart, max(trained) + 0.5 * apart)
    axes.axvline(scale.length, color="gray", linestyle=":", linewidth=1)
    axes.set_xscale("log", base=2)
    axes.annotate(
        "trained length", (scale.length, axes.get_ylim()[1]), (4, -12), textcoords="offset points", fontsize=8
    )
    _write(figure, picture)


def _losses(line: Line, sweep: Sweep, folder: Path) -> list[float]:
    """Return the training loss of a model's first seed at each step, in nats; empty if it is not in ``folder``."""
    return list(losses(folder / sweep.final_run(line.name, line.rate, sweep.seeds[0]).key()).values())


def _draw_steps(found: Sequence[Line], by_step: Mapping[str, list[float]], picture: Path) -> None:
    """Draw training losses over the steps, averaged over 2 % of them."""
    axes, figure = _axes("step", "training loss (bits per byte)")
    for i, line in enumerate(found):
        if line.name in by_step:
            bits = [loss / math.log(2) for loss in by_step[line.name]]
            width = max(1, len(bits) // 50)
            means = [mean(bits[at : at + width]) for at in range(0, len(bits) - width + 1, width)]
            axes.plot([width * (k + 1) for k in range(len(means))], means, **_style(i, line.name))
    _write(figure, picture)


def _style(i: int, name: str) -> dict[str, Any]:
    mixers = 1 + len(MIXERS)
    return {
        "label": name, "color": f"C{i % mixers}", "linestyle": "-" if i < mixers else "--",
        "linewidth": 2.5 if name.startswith("RAM-Net") else 1.2,
    }  # fmt: skip


def _axes(x: str, y: str) -> tuple[Any, Any]:
    from matplotlib.figure import Figure

    figure = Figure(figsize=(8, 5), layout="constrained")
    axes = figure.add_subplot(xlabel=x, ylabel=y)
    axes.grid(alpha=0.3)
    return axes, figure


def _write(figure: Any, picture: Path) -> None:
    figure.legend(loc="outside right upper", fontsize=8)
    write_png(picture, figure)
