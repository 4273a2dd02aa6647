"""Trains what a scale asks for, in processes side by side. What is done is kept and not repeated."""

from __future__ import annotations

import hashlib
import json
import multiprocessing
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor, as_completed
from pathlib import Path
from typing import NamedTuple

import torch
from pydantic import BaseModel, ConfigDict, ValidationError

from ramnet.config import one_line
from ramnet.files import read_text, write_text_atomic
from ramnet.recall.plan import RATES, Scale, configurations
from ramnet.training.model import Config, make
from ramnet.training.mqar import Mix, Mqar
from ramnet.training.recipe import Recipe

CHECKPOINT_SECONDS = 60.0


class Run(NamedTuple):
    """One training run."""

    name: str
    config: Config
    recipe: Recipe
    task: Mix

    def key(self) -> str:
        """Return a digest of all that determines the result."""
        parts = [self.config.model_dump(), self.recipe.model_dump(), self.task.describe()]
        return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()[:16]


class Outcome(BaseModel):
    """The result of a run."""

    model_config = ConfigDict(extra="forbid", strict=True)

    name: str
    learning_rate: float
    steps: int
    seed: int
    seconds: float
    accuracies: list[float]  # at each tested setting; all 0 if training diverged

    @property
    def mean(self) -> float:
        return sum(self.accuracies) / len(self.accuracies)


def count(scale: Scale) -> int:
    """Return how many runs ``sweep`` makes."""
    return len(list(configurations(scale))) * (len(RATES) + len(scale.seeds))


def sweep(scale: Scale, folder: Path, jobs: int, done: Callable[[Outcome], None], kernels: str) -> list[Outcome]:
    """Return the outcome of each configuration and seed at the best of its learning rates.

    Each of the four rates is first trained for ``search_steps``, then the best of them for ``steps``.

    Args:
        folder: where outcomes and checkpoints are kept. A run whose outcome is there is not repeated.
        jobs: processes, each on one thread.
        done: called with each outcome as it is known.
        kernels: the backend of the memory ops.

    Raises ValueError if an outcome in ``folder`` cannot be read.
    """
    mix = Mix(*(tuple(Mqar(*setting) for setting in settings) for settings in (scale.trained, scale.tested)))

    def run(name: str, config: Config, rate: float, steps: int, seed: int) -> Run:
        recipe = Recipe(steps=steps, batch_size=scale.batch_size, learning_rate=rate, weight_decay=0.1, seed=seed)
        return Run(name, config, recipe, mix)

    models = list(configurations(scale))
    search = [run(*model, rate, scale.search_steps, scale.seeds[0]) for model in models for rate in RATES]
    rates: dict[str, Outcome] = {}
    for outcome in _outcomes(search, folder, jobs, kernels):
        done(outcome)
        if outcome.name not in rates or outcome.mean > rates[outcome.name].mean:
            rates[outcome.name] = outcome
    final = [run(*model, rates[model[0]].learning_rate, scale.steps, seed) for model in models for seed in scale.seeds]
    outcomes = []
    for outcome in _outcomes(final, folder, jobs, kernels):
        done(outcome)
        outcomes.append(outcome)
    return outcomes


def _outcomes(runs: list[Run], folder: Path, jobs: int, kernels: str) -> Iterator[Outcome]:
    """Yield the outcome of each run as it ends, those that are known first."""
    known = {run: _known(folder / f"{run.key()}.json") for run in runs}
    yield from filter(None, known.values())
    missing = [run for run in runs if known[run] is None]
    if not missing:
        return
    with ProcessPoolExecutor(min(jobs, len(missing)), multiprocessing.get_context("spawn")) as pool:
        for future in as_completed([pool.submit(_train, run, folder, kernels) for run in missing]):
            yield future.result()


def _known(path: Path) -> Outcome | None:
    if not path.exists():
        return None
    try:
        return Outcome.model_validate_json(read_text(path))
    except ValidationError as error:
        raise ValueError(f"{path} is not an outcome of this experiment: {one_line(error)}; delete it") from None


def _train(run: Run, folder: Path, kernels: str) -> Outcome:
    """Train on one thread, from the run's last checkpoint if there is one, and write the outcome."""
    from ramnet import ops
    from ramnet.training import checkpoint
    from ramnet.training.loop import Diverged, train

    torch.set_num_threads(1)
    torch.manual_seed(run.recipe.seed)
    model, output = make(run.config), folder / run.key()
    resume = (output / checkpoint.FILE).exists()
    accuracies, seconds = [0.0] * len(run.task.tested), 0.0
    try:
        with ops.using(kernels):
            result = train(
                model, run.task, run.recipe, output=output, resume=resume, checkpoint_seconds=CHECKPOINT_SECONDS
            )
            accuracies, seconds = [setting.evaluate(model) for setting in run.task.tested], result.elapsed
    except Diverged:
        pass
    outcome = Outcome(
        name=run.name, learning_rate=run.recipe.learning_rate, steps=run.recipe.steps or 0, seed=run.recipe.seed,
        seconds=seconds, accuracies=accuracies,
    )  # fmt: skip
    write_text_atomic(folder / f"{run.key()}.json", outcome.model_dump_json(indent=1) + "\n")
    return outcome
