"""One training loop for every task."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

import torch
from rich.console import Console
from rich.progress import BarColumn, Progress, TaskProgressColumn, TextColumn, TimeRemainingColumn
from torch import Tensor

from ramnet.loss import IGNORED, summed_cross_entropy
from ramnet.model import RamNetForCausalLM, not_finite
from ramnet.training import checkpoint
from ramnet.training.recipe import BUDGET, Recipe

# In a row, and the run ends: the weights stay while steps are skipped, so if they are sound and even one batch in ten
# overflows, ten of them follow one another once in 10^10 steps.
MOST_SKIPPED = 10


class TrainingTask(Protocol):
    """What the loop trains on."""

    metric: str

    def describe(self) -> dict[str, Any]: ...

    def batch(self, size: int, generator: torch.Generator) -> tuple[Tensor, Tensor]: ...

    def evaluate(self, model: RamNetForCausalLM) -> float: ...


@dataclass
class Result:
    """What a run came to.

    Attributes:
        losses: of every step made here, skipped ones included, in nats a label.
        metric: the task's, at the end.
        step, elapsed: steps made and seconds trained, those before a resumption included.
        skipped: of the steps, those not taken because their loss or gradient was not finite.
    """

    losses: list[float] = field(default_factory=list)
    metric: float = math.nan
    step: int = 0
    elapsed: float = 0.0
    skipped: int = 0


def train(
    model: RamNetForCausalLM,
    task: TrainingTask,
    recipe: Recipe,
    *,
    output: Path | None = None,
    resume: bool = False,
    compiled: bool = False,
    checkpoint_seconds: float = 30.0,
    console: Console | None = None,
) -> Result:
    """Train ``model`` in place, on the kernels in use (``ramnet.ops.using``).

    A step whose loss or gradient is not finite is not taken: the weights and moments stay, and the run goes on with the
    next batch.

    Args:
        output: folder for checkpoints, every ``checkpoint_seconds`` and at the end; None writes nothing.
        resume: go on from the checkpoint in ``output``; under a budget in steps, exactly as if it had never stopped.
            A larger budget than it had goes on past its end, the learning rate on a cosine over the new total.
        compiled: run the model's forward and backward through torch.compile.
        console: where progress goes; None is silent.

    Raises:
        ValueError: for an ``output`` that cannot be written, a checkpoint that is damaged or of another run, or what
            the model refuses.
        RuntimeError: after ``MOST_SKIPPED`` steps in a row that were not finite, or where the weights, the moments or
            the metric no longer are when they are to be saved; the last checkpoint stays.
    """
    if output is not None:
        checkpoint.check_writable(output)
    optimizer = torch.optim.AdamW(
        model.parameters(), lr=recipe.learning_rate, betas=(0.9, 0.95), weight_decay=recipe.weight_decay, fused=True
    )
    generator = torch.Generator().manual_seed(recipe.seed)
    result = Result()
    if resume:
        if output is None:
            raise ValueError("resume needs an output folder to resume from")
        progress = checkpoint.Progress.load(output)
        _same_run(progress, model, task, recipe, output)
        checkpoint.load(output, model, optimizer, generator)
        result.step, result.elapsed, result.skipped = progress.step, progress.elapsed, progress.skipped
    hidden_states: Callable[..., Any] = torch.compile(model.hidden_states) if compiled else model.hidden_states

    stays = "" if output is None else f"; {output} is left as it is"

    @contextmanager
    def located() -> Iterator[None]:
        try:
            yield
        except ValueError as error:  # the reference refuses logits that are NaN
            raise ValueError(f"{error}, at step {result.step}{stays}") from error

    def measure() -> float:
        metric = math.nan
        if (wrong := not_finite(checkpoint.tensors(model, optimizer))) is None:
            with located():
                metric = task.evaluate(model)
        if math.isfinite(metric):
            return metric
        problem = f"the {task.metric} is {metric}" if wrong is None else f"{wrong} holds NaN or infinity"
        raise RuntimeError(f"{problem} after {result.step} steps; try a lower learning rate{stays}")

    def save() -> None:
        if output is not None:
            progress = checkpoint.Progress(
                config=model.config, task=task.describe(), recipe=recipe,
                step=result.step, elapsed=result.elapsed, skipped=result.skipped,
            )  # fmt: skip
            checkpoint.save(output, progress, model, optimizer, generator)

    began, saved = time.monotonic() - result.elapsed, time.monotonic()
    in_a_row = 0
    with _progress(console) as bar:
        line = bar.add_task("training", total=1.0, loss=math.nan, held_out="", skipped="")
        while (spent := recipe.spent(result.step, result.elapsed)) < 1:
            for group in optimizer.param_groups:
                group["lr"] = recipe.learning_rate_at(result.step, spent)
            inputs, labels = task.batch(recipe.batch_size, generator)
            optimizer.zero_grad()
            with located():
                hidden, _ = hidden_states(inputs)
            counted = labels != IGNORED
            # The vocabulary's product only where there is something to say: recall asks at 8 places in 64.
            hidden, labels = hidden[counted], labels[counted]
            loss = summed_cross_entropy(model.head, hidden, labels, model.config.vocab_size) / len(labels)
            loss.backward()
            norm = torch.nn.utils.clip_grad_norm_(model.parameters(), recipe.clip_norm)
            nats, length = torch.stack([loss.detach().double(), norm.double()]).tolist()
            if math.isfinite(nats) and math.isfinite(length):
                optimizer.step()
                in_a_row = 0
            else:
                in_a_row += 1
                result.skipped += 1
            result.losses.append(nats)
            result.step += 1
            result.elapsed = time.monotonic() - began
            if in_a_row == MOST_SKIPPED:
                raise RuntimeError(
                    f"{MOST_SKIPPED} steps in a row were not finite, at step {result.step} with a loss of {nats} and a"
                    f" gradient of norm {length}; try a lower learning rate{stays}"
                )
            skipped = f"  {result.skipped} skipped" if result.skipped else ""
            bar.update(line, completed=recipe.spent(result.step, result.elapsed), loss=nats, skipped=skipped)
            # Not after a skipped step, so that a run resumed counts those in a row as one never stopped does.
            if time.monotonic() - saved > checkpoint_seconds and in_a_row == 0:
                held_out = f"{task.metric} {measure():.3f}"
                bar.update(line, held_out=held_out)
                bar.console.print(
                    f"step {result.step:5d}  {result.elapsed:4.0f} s  loss {nats:.3f}  {held_out}{skipped}"
                )
                result.elapsed = time.monotonic() - began
                save()
                saved = time.monotonic()
    result.metric = measure()
    save()
    return result


def _progress(console: Console | None) -> Progress:
    return Progress(
        TextColumn("{task.description}"),
        BarColumn(),
        TaskProgressColumn(),
        TextColumn("loss {task.fields[loss]:.3f} {task.fields[held_out]}{task.fields[skipped]}"),
        TimeRemainingColumn(),
        console=console or Console(quiet=True),
    )


def _same_run(
    progress: checkpoint.Progress, model: RamNetForCausalLM, task: TrainingTask, recipe: Recipe, path: Path
) -> None:
    """ValueError, naming the first difference, where the checkpoint is of another run, or has as large a budget."""
    ours = {**recipe.model_dump(exclude=set(BUDGET)), **task.describe(), **model.config.model_dump()}
    saved = {**progress.recipe.model_dump(), **progress.task, **progress.config.model_dump()}
    for name, value in ours.items():
        if name not in saved:
            raise ValueError(
                f"{name} is {value!r} but the run in {path}, of another version, has no {name}; start a new run from"
                " its weights"
            )
        if saved[name] != value:
            raise ValueError(f"{name} is {value} but the run in {path} has {saved[name]}; resume it with the same")
    began, done = progress.recipe, (progress.step, progress.elapsed)
    changed = [name for name in BUDGET if getattr(recipe, name) != getattr(began, name)]
    if changed and recipe.spent(*done) >= began.spent(*done):
        name = next((name for name in changed if getattr(recipe, name) is not None), changed[0])
        raise ValueError(
            f"{name} is {getattr(recipe, name)} but the run in {path} has {getattr(began, name)}; resume it with the"
            " same, or with more"
        )
