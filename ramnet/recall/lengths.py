"""Recall at lengths that a model was not trained on, read in blocks with the state that the blocks before left."""

from __future__ import annotations

import json
import math
from collections import defaultdict
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

from ramnet.config import RamNetConfig
from ramnet.files import write_png, write_text_atomic
from ramnet.loss import IGNORED
from ramnet.markdown import markdown_table
from ramnet.model import RamNetForCausalLM
from ramnet.recall.plan import name_of
from ramnet.state import RamState
from ramnet.training.checkpoint import FILE, Progress
from ramnet.training.mqar import HELD_OUT_EXAMPLES, Mqar, right
from ramnet.training.recipe import HELD_OUT_SEED
from ramnet.training.sweep import Outcome, known_outcome, worth

TABLE, DATA, PICTURE = "lengths.md", "lengths.json", "lengths.png"
LENGTHS = tuple(2**i for i in range(6, 17))  # 64 to 65 536
# Tokens of all examples of a length, of which there are at most 1000: 32 of the longest.
MOST_TOKENS = 2**21
ROWS, BLOCK = 32, 256  # examples and tokens that are computed at a time


class Accuracy(NamedTuple):
    """Accuracy at one length.

    Attributes:
        all: of all queries.
        late: of those in the second half of the sequence; None if there are none.
    """

    length: int
    examples: int
    all: float
    late: float | None


class Measured(NamedTuple):
    """What was measured of a model; ``trained`` is the longest example of its training, if its checkpoint says so."""

    name: str
    checkpoint: str
    state: int
    trained: int | None
    accuracies: list[Accuracy]


def measure(model: RamNetForCausalLM, pairs: int) -> Iterator[Accuracy]:
    """Yield the accuracy at each of ``LENGTHS`` that has room for ``pairs`` and their queries.

    Examples are those of ``Mqar`` at that length: pairs at the beginning, then queries whose places follow its power
    law over the whole length, among random tokens. Of the memory, only the token ids grow with the length.

    Raises:
        ValueError: if the vocabulary has no room for the pairs.
    """
    for length in LENGTHS:
        if length >= 4 * pairs:
            task = Mqar(pairs, length, model.config.vocab_size)
            count = min(HELD_OUT_EXAMPLES, MOST_TOKENS // length)
            generator = torch.Generator().manual_seed(HELD_OUT_SEED)
            places, found = [], []
            for start in range(0, count, ROWS):
                inputs, labels = task.batch(min(ROWS, count - start), generator)
                places.append((labels != IGNORED).nonzero()[:, 1])
                found.append(answers(model, inputs, labels))
            every = torch.cat(found)
            late = every[torch.cat(places) >= length // 2]
            yield Accuracy(length, count, float(every.mean()), float(late.mean()) if len(late) else None)


@torch.no_grad()
def answers(model: RamNetForCausalLM, inputs: Tensor, labels: Tensor) -> Tensor:
    """Return what ``ramnet.training.mqar.right`` does, of sequences of any length."""
    state: RamState | None = None
    found = torch.zeros(labels.shape)
    for at in range(0, inputs.shape[1], BLOCK):
        block = slice(at, at + BLOCK)
        hidden, state = model.hidden_states(inputs[:, block], state)
        found[:, block][labels[:, block] != IGNORED] = right(model, hidden, labels[:, block])
    return found[labels != IGNORED]


def folders(given: Path) -> list[Path]:
    """Return ``given`` if it is a checkpoint, else one of each RAM-Net that ``ramnet recall`` trained to the end there.

    It is the first seed at the rate at which most seeds ended, and of such rates at that of the highest mean accuracy.

    Raises:
        ValueError: if there are none.
    """
    if (given / "config.json").is_file():
        return [given]
    rates: dict[str, dict[float, list[tuple[Outcome, Path]]]] = defaultdict(lambda: defaultdict(list))
    for folder in (path.parent for path in given.glob(f"*/{FILE}")):
        outcome = known_outcome(folder.with_suffix(".json"))
        if outcome and outcome.scores:
            progress = Progress.load(folder)
            if isinstance(progress.config, RamNetConfig) and str(progress.task.get("task")).startswith("mqar"):
                model = json.dumps([outcome.name, progress.task, outcome.steps])
                rates[model][outcome.learning_rate].append((outcome, folder))

    def of_rate(ended: list[tuple[Outcome, Path]]) -> tuple[int, float]:
        return worth([outcome for outcome, _ in ended], "highest")

    best = [max(by_rate.values(), key=of_rate) for _, by_rate in sorted(rates.items())]
    found = [min(ended, key=lambda each: each[0].seed)[1] for ended in best]
    if not found:
        raise ValueError(
            f"{given} is neither a checkpoint nor a folder of ramnet recall with a RAM-Net trained to the end"
        )
    return found


def trained(folder: Path) -> int | None:
    """Return the longest length that the model in a checkpoint ``folder`` was trained on; None if it does not say."""
    task = Progress.load(folder).task if (folder / FILE).is_file() else {}
    lengths = [each["length"] for each in task.get("trained", [task]) if "length" in each]
    return max(lengths, default=None)


def names(models: Sequence[RamNetForCausalLM], folders: Sequence[Path]) -> list[str]:
    """Return the name of each model, with its folder where several of them have the same sizes."""
    sizes = [name_of(model.config) for model in models]
    return [f"{size} {each}" if sizes.count(size) > 1 else size for size, each in zip(sizes, folders, strict=True)]


def save(found: Sequence[Measured], pairs: int, folder: Path) -> list[Path]:
    """Write the results as JSON, as a Markdown table and as a picture, each atomically, and return their paths."""
    facts = [
        {"pairs": pairs, **each._asdict(), "accuracies": [accuracy._asdict() for accuracy in each.accuracies]}
        for each in found
    ]
    write_text_atomic(folder / DATA, json.dumps(facts, indent=1) + "\n")
    write_text_atomic(folder / TABLE, markdown(found, pairs))
    _draw(found, pairs, folder / PICTURE)
    return [folder / name for name in (DATA, TABLE, PICTURE)]


def markdown(found: Sequence[Measured], pairs: int) -> str:
    """Return the table of accuracies by length, each with that of the second half's queries."""
    head = [f"{pairs} pairs", "state", "trained", *(str(each.length) for each in found[0].accuracies)]
    rows = [
        [
            each.name,
            str(each.state),
            str(each.trained or ""),
            *(f"{x.all:.3f} ({shown(x.late)})" for x in each.accuracies),
        ]
        for each in found
    ]
    return markdown_table(head, rows, numbers=True) + "\n"


def shown(accuracy: float | None) -> str:
    """Format an accuracy; a dash if there is none."""
    return "–" if accuracy is None else f"{accuracy:.3f}"


def _draw(found: Sequence[Measured], pairs: int, picture: Path) -> None:
    """Draw accuracy against length: all queries solid, those of the second half dashed, trained lengths dotted."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(8, 5), layout="constrained")
    axes = figure.add_subplot(xlabel="tokens", ylabel=f"accuracy, {pairs} pairs", ylim=(0, 1.02))
    axes.set_xscale("log", base=2)
    for i, each in enumerate(found):
        lengths = [x.length for x in each.accuracies]
        axes.plot(lengths, [x.all for x in each.accuracies], marker="o", color=f"C{i}", label=each.name)
        axes.plot(
            lengths,
            [x.late if x.late is not None else math.nan for x in each.accuracies],
            "--",
            marker=".",
            color=f"C{i}",
            linewidth=1,
        )
        if each.trained:
            axes.axvline(each.trained, color=f"C{i}", linestyle=":", linewidth=1)
    axes.plot([], [], "--", marker=".", color="gray", linewidth=1, label="second half's queries")
    if any(each.trained for each in found):
        axes.plot([], [], ":", color="gray", linewidth=1, label="longest trained")
    axes.grid(alpha=0.3)
    figure.legend(loc="outside right upper", fontsize=8)
    write_png(picture, figure)
