"""What a run was like at each step: a file of JSON lines, TensorBoard, and a picture of the loss."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

from ramnet.files import write_png, write_text_atomic

FILE, PICTURE = "metrics.jsonl", "loss.png"


class Metrics:
    """Collects a record of each step and writes them, when asked, beside the checkpoint.

    A run that is resumed first removes the records of steps after its checkpoint, and a new run those of an older one,
    so that no step is in the file twice.

    Args:
        folder: where ``metrics.jsonl`` is; None writes nothing.
        step: the step of the checkpoint that the run begins from.
    """

    def __init__(self, folder: Path | None, step: int) -> None:
        self._folder, self._step = folder, step
        self._new: list[dict[str, Any]] = []
        self._board: Any = None
        self._begun = False

    def add(self, **record: float) -> None:
        """Keep a record until ``write``. Numbers that are not finite become null."""
        self._new.append({name: x if math.isfinite(x) else None for name, x in record.items()})

    def amend(self, **values: float) -> None:
        """Add values to the last record, unless it is written already."""
        for record in self._new[-1:]:
            record |= values

    def write(self) -> None:
        """Append the records since the last call to the file, and to TensorBoard if it is installed."""
        if self._folder is not None:
            path = self._folder / FILE
            lines = "".join(json.dumps(record) + "\n" for record in self._new)
            if not self._begun:
                kept = [record for record in read(path) if record["step"] <= self._step] if self._step else []
                write_text_atomic(path, "".join(json.dumps(record) + "\n" for record in kept) + lines)
                self._board, self._begun = _tensorboard(self._folder, self._step), True
            elif lines:
                with path.open("a", encoding="utf-8") as file:
                    file.write(lines)
            if self._board is not None:
                for record in self._new:
                    for name, value in record.items():
                        if name != "step" and value is not None:
                            self._board.add_scalar(name, value, record["step"])
                self._board.flush()
        self._new = []


def read(path: Path) -> list[dict[str, Any]]:
    """Return the records of a metrics file, up to one that was cut off or damaged; none if there is no file."""
    records: list[dict[str, Any]] = []
    if path.is_file():
        for line in path.read_text(encoding="utf-8", errors="replace").splitlines():
            try:
                record = json.loads(line)
            except (ValueError, RecursionError):
                break
            if not isinstance(record, dict) or not isinstance(record.get("step"), int):
                break
            if not isinstance(record.get("loss"), int | float | None):
                break
            records.append(record)
    return records


def losses(folder: Path) -> dict[int, float]:
    """Return the loss of each step in ``metrics.jsonl``, in nats per label, without those that were not finite."""
    return {record["step"]: record["loss"] for record in read(folder / FILE) if record.get("loss") is not None}


def _tensorboard(folder: Path, step: int) -> Any:
    try:
        from torch.utils.tensorboard import SummaryWriter
    except ImportError:
        return None
    return SummaryWriter(folder / "tensorboard", purge_step=step + 1)


def picture(folder: Path) -> Path | None:
    """Draw the loss in ``metrics.jsonl`` over the steps, and return the picture's path; None without matplotlib."""
    try:
        from matplotlib.figure import Figure
    except ImportError:
        return None
    found = losses(folder)
    steps = list(found)
    average: list[float] = []
    share = 0.0
    for loss in found.values():  # weights of 0.98^age, which add up to ``share``
        share = 0.98 * share + 0.02
        before = average[-1] if average else 0.0
        average.append(before + (loss - before) * 0.02 / share)
    figure = Figure(figsize=(7, 4), layout="constrained")
    axes = figure.add_subplot(xlabel="step", ylabel="loss (nats per label)")
    axes.plot(steps, list(found.values()), color="#9ecae1", linewidth=0.6, label="each step")
    axes.plot(steps, average, color="#08519c", label="average of about 50 steps")
    axes.grid(alpha=0.3)
    axes.legend()
    write_png(folder / PICTURE, figure)
    return folder / PICTURE
