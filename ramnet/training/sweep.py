"""Trains several models in processes side by side, each at its best learning rate. What is done is not repeated."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterable, Mapping, Sequence
from concurrent.futures import as_completed
from dataclasses import dataclass
from math import inf, isfinite
from pathlib import Path
from statistics import mean
from typing import Literal, NamedTuple, Protocol

import torch
from pydantic import BaseModel, ConfigDict, ValidationError

from ramnet.config import one_line
from ramnet.files import read_text, write_text_atomic
from ramnet.processes import process_pool
from ramnet.training.loop import Result, TrainingTask
from ramnet.training.metrics import FILE as METRICS
from ramnet.training.metrics import losses
from ramnet.training.model import Config, Model, make
from ramnet.training.recipe import Recipe

RATES = (1e-3, 3.2e-3, 1e-2, 3.2e-2)  # the learning rates that the paper tries
NOISE = 0.01  # differences of a metric, an accuracy or bits per byte, that are not taken for a worse end
# Raised when a configuration trains otherwise than before, so that outcomes from then are not taken for its.
REVISION = 1
CHECKPOINT_SECONDS = 300.0  # each evaluates the model, which takes 5 s in the recall experiment


class ScoredTask(TrainingTask, Protocol):
    """What models are compared on."""

    @property
    def best(self) -> Literal["highest", "lowest"]: ...  # which value of the metric

    def scores(self, model: Model) -> list[float]: ...  # of a model trained to the end


class Run(NamedTuple):
    """One training run. ``scored`` asks for the task's scores at its end."""

    name: str
    config: Config
    recipe: Recipe
    task: ScoredTask
    scored: bool

    def key(self) -> str:
        """Return a digest of all that determines the result. Neither the model's name nor, where the task has a digest
        of its text, the names of files do."""
        task = self.task.describe()
        if "digest" in task:
            task = {**task, "files": []}
        parts = [REVISION, self.config.model_dump(), self.recipe.model_dump(), task, self.scored]
        return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()[:16]


class Outcome(BaseModel):
    """The result of a run.

    Attributes:
        loss: mean of the last tenth of the steps, in nats per label; None if training diverged or a score is undefined.
        metric: the task's; None likewise.
        scores: the task's, of runs that ask for them; empty likewise.
        skipped: steps whose update was skipped because the loss or gradient was not finite.
    """

    model_config = ConfigDict(extra="forbid", strict=True, allow_inf_nan=False)

    name: str
    learning_rate: float
    steps: int
    seed: int
    seconds: float
    loss: float | None
    metric: float | None
    scores: list[float]
    skipped: int = 0


def by_name(outcomes: Iterable[Outcome]) -> dict[str, list[Outcome]]:
    """Return the outcomes of each model, those of its seeds, in the models' order."""
    found: dict[str, list[Outcome]] = {}
    for outcome in outcomes:
        found.setdefault(outcome.name, []).append(outcome)
    return found


def remarks(models: Iterable[str], seeds: int, outcomes: Iterable[Outcome]) -> list[str]:
    """Return sentences on what a table of means over seeds does not show: training that diverged, and skipped steps."""
    ended = by_name(outcomes)
    found = []
    for name in models:
        of = ended.get(name, [])
        if not of:
            found.append(f"{name} diverged at every rate that was trained to the end.")
        elif len(of) < seeds:
            found.append(f"{name} diverged with {seeds - len(of)} of {seeds} seeds, which its means leave out.")
        if skipped := sum(outcome.skipped for outcome in of):
            found.append(f"{name} skipped {skipped} steps whose loss or gradient was not finite.")
    return found


@dataclass(frozen=True)
class Sweep:
    """What is trained.

    Attributes:
        models: the models' configurations by their names.
        search: how each of ``RATES`` is tried, but for the rate.
        final: how the best of them are trained to the end, but for rate and seed.
        seeds: seeds of those runs.
        finalists: how many of the best rates are trained to the end.
    """

    models: Mapping[str, Config]
    task: ScoredTask
    search: Recipe
    final: Recipe
    seeds: tuple[int, ...]
    finalists: int = 1

    def __len__(self) -> int:
        """Return the number of runs, if no model ends worse than in its search."""
        return len(self.models) * (len(RATES) + self.finalists * len(self.seeds))

    def run(self, folder: Path, jobs: int, kernels: str, done: Callable[[Outcome], None]) -> list[Outcome]:
        """Return the outcomes of each model and seed at the best of its learning rates, without those that diverged.

        The rates with the least loss in the search are trained to the end, as losses differ before any metric does. If
        the model ends with a worse metric than in the search, as it may at a high rate, which stays high for longer,
        the next rate is, too.

        Args:
            folder: where outcomes and checkpoints are kept. A run whose outcome is there is not repeated.
            jobs: processes, each on one thread.
            kernels: the backend of the memory ops. Models are on the GPU if there is one, unless this is "cpu".
            done: called with each outcome as it is known, those of the search too.

        Raises ValueError if an outcome in ``folder`` cannot be read.
        """
        search = [
            Run(name, config, self.search.model_copy(update={"learning_rate": rate}), self.task, scored=False)
            for name, config in self.models.items()
            for rate in RATES
        ]
        tried = by_name(_outcomes(search, folder, jobs, kernels, done))
        ranked = {name: sorted(tried[name], key=_loss) for name in self.models if name in tried}
        best: dict[str, list[Outcome]] = {}
        waiting, begin, end = list(ranked), 0, self.finalists
        while waiting:
            chosen = [(name, outcome.learning_rate) for name in waiting for outcome in ranked[name][begin:end]]
            final = [self.final_run(*each, seed) for each in chosen for seed in self.seeds]
            ended = _outcomes(final, folder, jobs, kernels, done)
            for name, rate in chosen:
                outcomes = [each for each in ended if (each.name, each.learning_rate) == (name, rate)]
                if self._worth(*outcomes) > self._worth(*best.get(name, [])):
                    best[name] = outcomes
            waiting = [
                name
                for name in waiting
                if ranked[name][end:]
                and self._worth(*best.get(name, []))[1] < max(self._worth(each)[1] for each in ranked[name]) - NOISE
            ]
            begin, end = end, end + 1
        return [outcome for name in self.models for outcome in sorted(best.get(name, []), key=lambda each: each.seed)]

    def final_run(self, name: str, rate: float, seed: int) -> Run:
        """Return the run of a model to the end."""
        recipe = self.final.model_copy(update={"learning_rate": rate, "seed": seed})
        return Run(name, self.models[name], recipe, self.task, scored=True)

    def _worth(self, *outcomes: Outcome) -> tuple[int, float]:
        return worth(outcomes, self.task.best)


def worth(outcomes: Sequence[Outcome], best: Literal["highest", "lowest"]) -> tuple[int, float]:
    """Return what a rate is worth, first the number of seeds that ended, as diverging is worse than any metric.

    The second is the mean of their metric, negated if lower is better; minus infinity of no seed.
    """
    sign = 1 if best == "highest" else -1
    metrics = [sign * outcome.metric for outcome in outcomes if outcome.metric is not None]
    return len(metrics), mean(metrics) if metrics else -inf


def _loss(outcome: Outcome) -> float:
    return inf if outcome.loss is None else outcome.loss


def _outcomes(runs: list[Run], folder: Path, jobs: int, kernels: str, done: Callable[[Outcome], None]) -> list[Outcome]:
    """Return the outcomes of the runs that did not diverge, after calling ``done`` with each as it ends."""
    found: list[Outcome] = []

    def end(outcome: Outcome) -> None:
        done(outcome)
        if outcome.metric is not None:
            found.append(outcome)

    known = [_known(run, folder / f"{run.key()}.json") for run in runs]
    for outcome in filter(None, known):
        end(outcome)
    missing = [run for run, outcome in zip(runs, known, strict=True) if outcome is None]
    if missing:
        with process_pool(min(jobs, len(missing))) as pool:
            for future in as_completed([pool.submit(_train, run, folder, kernels) for run in missing]):
                end(future.result())
    return found


def known_outcome(path: Path) -> Outcome | None:
    """Read the outcome in a file; None if there is no file. Raises ValueError, naming it, if it is not an outcome."""
    if not path.exists():
        return None
    try:
        return Outcome.model_validate_json(read_text(path))
    except ValidationError as error:
        raise ValueError(f"{path} is not an outcome of this experiment: {one_line(error)}; delete it") from None


def _known(run: Run, path: Path) -> Outcome | None:
    """Return ``known_outcome`` under the run's name, as another scale may have trained the same model under another.

    Raises ValueError if it is of another run, or is incomplete.
    """
    outcome = known_outcome(path)
    if outcome is None:
        return None
    recipe = run.recipe
    found = outcome.learning_rate, outcome.steps, outcome.seed
    expected = recipe.learning_rate, recipe.steps or 0, recipe.seed
    if found != expected or bool(outcome.scores) != (run.scored and outcome.metric is not None):
        raise ValueError(f"{path} is not the outcome of {run.name} at rate {recipe.learning_rate:g}; delete it")
    return outcome.model_copy(update={"name": run.name})


def _train(run: Run, folder: Path, kernels: str) -> Outcome:
    """Train on one thread or the GPU, from the run's last checkpoint if there is one, and write the outcome."""
    from ramnet import ops
    from ramnet.allocator import keep_freed_memory
    from ramnet.ops.checks import LogitsError
    from ramnet.training import checkpoint
    from ramnet.training.loop import Diverged, train

    keep_freed_memory()
    torch.set_num_threads(1)
    torch.manual_seed(run.recipe.seed)
    model, output = make(run.config), folder / run.key()
    model.to("cuda" if kernels != "cpu" and torch.cuda.is_available() else "cpu")
    resume = (output / checkpoint.FILE).exists()
    loss, metric, scores, seconds, skipped = None, None, [], 0.0, 0
    try:
        with ops.using(kernels), checkpoint.alone(output):
            result = train(
                model, run.task, run.recipe, output=output, resume=resume, checkpoint_seconds=CHECKPOINT_SECONDS
            )
            seconds, skipped = result.elapsed, result.skipped
            scores = run.task.scores(model) if run.scored else []
            if not all(map(isfinite, scores)):
                raise Diverged(f"the scores are {scores}")
            loss, metric = _last_loss(output, result), result.metric
    except (Diverged, LogitsError):  # the reference may refuse logits at the scores' lengths only
        scores = []
    outcome = Outcome(
        name=run.name, learning_rate=run.recipe.learning_rate, steps=run.recipe.steps or 0, seed=run.recipe.seed,
        seconds=seconds, loss=loss, metric=metric, scores=scores, skipped=skipped,
    )  # fmt: skip
    write_text_atomic(folder / f"{run.key()}.json", outcome.model_dump_json(indent=1) + "\n")
    return outcome


def _last_loss(folder: Path, result: Result) -> float | None:
    """Return the mean loss of the last tenth of a run's steps; None if no loss was finite.

    Raises ValueError if the file of losses lacks some.
    """
    found = list(losses(folder).values())
    if len(found) < result.step - result.skipped:
        raise ValueError(
            f"{folder / METRICS} has the losses of {len(found)} of {result.step} steps; delete {folder} to train anew"
        )
    return mean(found[len(found) * 9 // 10 :]) if found else None
