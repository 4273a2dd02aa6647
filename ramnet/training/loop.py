"""The training loop of all tasks."""

from __future__ import annotations

import math
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

import torch
from rich.console import Console
from torch import Tensor, nn
from torch.utils import _pytree

from ramnet.loss import IGNORED
from ramnet.model import not_finite
from ramnet.ops.checks import LogitsError
from ramnet.state import RamState
from ramnet.training import checkpoint
from ramnet.training.batch import Batch
from ramnet.training.display import Speed, progress_bar
from ramnet.training.flops import peak_flops, step_flops
from ramnet.training.metrics import Metrics
from ramnet.training.model import Model
from ramnet.training.objective import Execution, Objective, recomputed
from ramnet.training.optimizer import adamw
from ramnet.training.parallel import Parallel
from ramnet.training.recipe import BUDGET, Recipe

# The run ends after this many skipped steps in a row. Weights do not change while steps are skipped, so if they are
# sound and one batch in ten overflows, ten in a row occur once in 10^10 steps.
MOST_SKIPPED = 10


class Diverged(RuntimeError):  # noqa: N818 - it is what training did
    """Training cannot go on, as its values are not finite."""


class TrainingTask(Protocol):
    """What the loop trains on."""

    metric: str  # the name of what evaluate returns

    def describe(self) -> dict[str, Any]: ...  # what defines the task, for a checkpoint

    # Inputs and labels, int64 [B, T], and what else ``Batch`` has.
    def batch(self, size: int, generator: torch.Generator) -> Batch | tuple[Tensor, Tensor]: ...

    def evaluate(self, model: Model) -> float: ...  # on held-out data


@runtime_checkable
class HasPlaces(Protocol):
    """A task whose next batch depends on the last, through ``places``, which a checkpoint keeps."""

    places: Tensor | None


@dataclass
class Result:
    """The result of a run.

    Attributes:
        losses: the loss of every step since the start or resumption, including skipped ones, in nats per label.
        metric: the task's metric after the last step.
        step: steps, including skipped ones and those before a resumption.
        elapsed: seconds trained, including those before a resumption.
        skipped: steps whose update was skipped because the loss or gradient was not finite.
    """

    losses: list[float] = field(default_factory=list)
    metric: float = math.nan
    step: int = 0
    elapsed: float = 0.0
    skipped: int = 0


def train(
    model: Model,
    task: TrainingTask,
    recipe: Recipe,
    *,
    output: Path | None = None,
    resume: bool = False,
    execution: Execution = Execution(),  # noqa: B008 - immutable
    parallel: Parallel = Parallel(),  # noqa: B008 - immutable
    checkpoint_seconds: float = 30.0,
    console: Console | None = None,
) -> Result:
    """Train ``model`` in place, on the backend in use (``ramnet.ops.using``).

    If the loss or gradient of a step is not finite, the step is skipped: weights and moments do not change, and the
    run continues with the next batch.

    Args:
        output: the folder for checkpoints and ``metrics.jsonl``; None writes nothing.
        resume: continue from the checkpoint in ``output``. With a budget in steps, the result is that of a run that
            was never interrupted. A larger budget than before extends the run; the learning rate then follows a
            cosine over the new total.
        execution: how a step is computed.
        parallel: the processes that share each batch. All draw the same batches, so that their number does not matter
            but for rounding; rank 0 evaluates and writes.
        checkpoint_seconds: seconds between checkpoints; another is written at the end.
        console: displays the progress; None displays nothing.

    Raises:
        ValueError: if ``output`` cannot be written, the processes cannot share a batch equally, the checkpoint is
            damaged or of another run, or the model raises it.
        Diverged: after ``MOST_SKIPPED`` skipped steps in a row, if the weights, moments or metric are not finite at a
            checkpoint, or if the reference refuses the logits of addresses. The previous checkpoint stays.
    """
    if output is not None:
        checkpoint.check_writable(output)
    parallel.check(recipe.batch_size)
    generator = torch.Generator().manual_seed(recipe.seed)
    device = model.embedding.weight.device
    result = Result()
    loaded: checkpoint.Loaded | None = None
    if resume:
        if output is None:
            raise ValueError("resume needs an output folder to resume from")
        progress = checkpoint.Progress.load(output)
        _same_run(progress, model, task, recipe, output)
        loaded = checkpoint.load(output, model, generator)
        result.step, result.elapsed, result.skipped = progress.step, progress.elapsed, progress.skipped
    if isinstance(task, HasPlaces):  # an earlier run on the task may have left its own
        task.places = None if loaded is None else loaded.places
    objective = parallel.wrap(Objective(model, recipe.precision, execution.compiled))
    optimizer = adamw(model, recipe)
    carried: RamState | None = None  # of this process's rows, after the last step
    if loaded is not None:
        checkpoint.restore(loaded.moments, model, optimizer)
        carried = _pytree.tree_map_only(Tensor, parallel.own, loaded.state)
    metrics = Metrics(output if parallel.rank == 0 else None, result.step)
    stays = "" if output is None else f"; {output} is left as it is"

    @contextmanager
    def diverging() -> Iterator[None]:
        try:
            yield
        except LogitsError as error:  # of the reference; kernels propagate NaN
            raise Diverged(f"{error}, at step {result.step}; try a lower learning rate{stays}") from error

    def measure() -> tuple[float, dict[str, Tensor]]:
        """Return the metric and what a checkpoint holds. Raises Diverged if either is not finite."""
        metric, saved = math.nan, checkpoint.tensors(model, optimizer)
        if (state := parallel.state(carried)) is not None:
            saved |= {f"state.{name}": x for name, x in state.tensors().items()}
        if (wrong := not_finite(saved)) is None:
            if parallel.rank == 0:
                with diverging():
                    metric = task.evaluate(checkpoint.complete(model.config, saved) if parallel.shards else model)
            metric = parallel.of_first(metric, device)
        if math.isfinite(metric):
            metrics.amend(held_out=metric)
            return metric, saved
        problem = f"the {task.metric} is {metric}" if wrong is None else f"{wrong} holds NaN or infinity"
        raise Diverged(f"{problem} after {result.step} steps; try a lower learning rate{stays}")

    def save(saved: dict[str, Tensor]) -> None:
        metrics.write()
        if output is not None and parallel.rank == 0:
            progress = checkpoint.Progress(
                config=model.config, task=task.describe(), recipe=recipe,
                step=result.step, elapsed=result.elapsed, skipped=result.skipped, micro_batch=execution.micro_batch,
                recompute=execution.recompute, compiled=execution.compiled, checkpoint_seconds=checkpoint_seconds,
            )  # fmt: skip
            if isinstance(task, HasPlaces) and task.places is not None:
                saved["places"] = task.places
            written = checkpoint.complete(model.config, saved) if parallel.shards else model
            checkpoint.save(output, progress, written, saved, generator)

    # The share of the machines' operations is shown only, so their peak is not measured otherwise.
    peak = parallel.count * peak_flops(device, getattr(torch, recipe.precision)) if console is not None else math.inf
    speed = Speed(step_flops(model, 1, 0), step_flops(model, 0, 1), peak, since=result.elapsed)
    began, saved_at = time.monotonic() - result.elapsed, time.monotonic()

    def clock() -> float:
        return parallel.of_first(time.monotonic() - began, device)

    in_a_row = 0
    with recomputed(model, execution.recompute), progress_bar(console) as bar:
        line = bar.add_task("training", total=1.0, loss=math.nan, speed="", held_out="", skipped="")
        while (spent := recipe.spent(result.step, result.elapsed)) < 1:
            rate = recipe.learning_rate_at(result.step, spent)
            for group in optimizer.param_groups:
                group["lr"] = rate
            batch = Batch(*task.batch(recipe.batch_size, generator))
            counted = (batch.labels != IGNORED).sum()  # 0 of documents of one token
            mine = parallel.batch(batch).to(device)
            optimizer.zero_grad()
            with diverging():
                loss, after = _add_gradients(
                    objective, mine, counted.clamp(min=1).to(device), carried, execution.micro_batch, parallel
                )
            norm = checkpoint.whole(torch.nn.utils.clip_grad_norm_(model.parameters(), recipe.clip_norm))
            nats, length = torch.stack([loss, norm.double()]).tolist()
            if math.isfinite(nats) and math.isfinite(length):
                optimizer.step()
                in_a_row = 0
                carried = after
            else:
                carried = None  # it may hold NaN; the rows go on from a fresh state
                in_a_row += 1
                result.skipped += 1
            result.losses.append(nats)
            result.step += 1
            before, result.elapsed = result.elapsed, clock()
            metrics.add(
                step=result.step, loss=nats, learning_rate=rate, gradient_norm=length,
                tokens_per_second=batch.inputs.numel() / (result.elapsed - before), elapsed=result.elapsed,
            )  # fmt: skip
            speed.add(batch.inputs.numel(), int(counted), result.elapsed)
            if in_a_row == MOST_SKIPPED:
                raise Diverged(
                    f"{MOST_SKIPPED} steps in a row were not finite, at step {result.step} with a loss of {nats} and a"
                    f" gradient of norm {length}; try a lower learning rate{stays}"
                )
            skipped = f"  {result.skipped} skipped" if result.skipped else ""
            completed = recipe.spent(result.step, result.elapsed)
            bar.update(line, completed=completed, loss=nats, speed=speed.text, skipped=skipped)
            # No checkpoint is written after a skipped step, as a resumed run counts skipped steps in a row from 0.
            if parallel.of_first(time.monotonic() - saved_at, device) > checkpoint_seconds and in_a_row == 0:
                metric, saved = measure()
                held_out = f"{task.metric} {metric:.3f}"
                bar.update(line, held_out=held_out)
                bar.console.print(
                    f"step {result.step:5d}  {result.elapsed:4.0f} s  loss {nats:.3f}  {speed.text}  {held_out}"
                    + skipped
                )
                save(saved)
                saved_at = time.monotonic()
                began = saved_at - result.elapsed  # evaluations and checkpoints are not training
                speed.restart(result.elapsed)
    result.metric, saved = measure()
    save(saved)
    return result


def _add_gradients(
    objective: nn.Module, mine: Batch, counted: Tensor, carried: RamState | None, micro_batch: int | None,
    parallel: Parallel,
) -> tuple[Tensor, RamState | None]:  # fmt: skip
    """Add the gradients of a batch's loss to the parameters'.

    Args:
        mine: this process's rows of the batch, which are computed ``micro_batch`` at a time.
        counted: labels of all processes' rows, at least 1, int64 [].
        carried: the state before this process's rows.

    Returns the loss of all processes' rows in nats per label, float64 [], and the state after this process's rows.
    """
    parts = mine.split(micro_batch or len(mine.inputs))
    before = [None] * len(parts) if carried is None else carried.split([len(part.inputs) for part in parts])
    losses, after = [], []
    for i, (part, state) in enumerate(zip(parts, before, strict=True)):
        with parallel.accumulating(objective, i == len(parts) - 1):
            loss, state = objective(part, state)
            # The gradients of the processes are averaged, and must be added up.
            (loss * parallel.count / counted).backward()
        losses.append(loss.detach().double() / counted)
        after.append(state)
    return parallel.total(torch.stack(losses).sum()), None if after[0] is None else RamState.merge(after)


def _same_run(progress: checkpoint.Progress, model: Model, task: TrainingTask, recipe: Recipe, path: Path) -> None:
    """Raise ValueError if the checkpoint is of another run, or if the budget was changed and is not larger."""
    ours = {**recipe.model_dump(exclude=set(BUDGET)), **task.describe(), **model.config.model_dump()}
    saved = {**progress.recipe.model_dump(), **progress.task, **progress.config.model_dump()}
    for name, value in ours.items():
        if name not in saved:
            raise ValueError(
                f"{name} is {value!r} but the run in {path}, of another version, has no {name}; start a new run from"
                " its weights"
            )
        if name in ("files", "tokenizer") and "digest" in ours:  # which is of their contents and order
            continue
        if name == "digest" and saved[name] != value:
            raise ValueError(checkpoint.OTHER_TEXT)
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
