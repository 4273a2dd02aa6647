"""Sweeps whose training takes no time."""

from __future__ import annotations

from pathlib import Path

import pytest

from ramnet.training import sweep
from ramnet.training.sweep import RATES, Outcome, Run


def outcome_of(run: Run, scores: tuple[float, ...] = (0.9, 0.5)) -> Outcome:
    """The third rate has the highest metric and the least loss, and the first the lowest and the greatest."""
    metric = (0.1, 0.2, 0.7, 0.2)[RATES.index(run.recipe.learning_rate)]
    found = list(scores) if run.scored else []
    recipe = run.recipe
    return Outcome(name=run.name, learning_rate=recipe.learning_rate, steps=recipe.steps or 0, seed=recipe.seed,
                   seconds=1.0, loss=1 - metric, metric=metric, scores=found)  # fmt: skip


@pytest.fixture
def trained(monkeypatch: pytest.MonkeyPatch) -> list[Run]:
    """The runs that were made, in this process, by a training that takes no time."""
    made: list[Run] = []

    class Here:
        def __init__(self, *_: object) -> None: ...
        def __enter__(self) -> Here:
            return self

        def __exit__(self, *_: object) -> None: ...
        def submit(self, work: object, run: Run, folder: Path, kernels: str) -> Run:
            return run

    def ended(runs: list[Run]) -> list[object]:
        return [type("Future", (), {"result": staticmethod(lambda run=run: train(run))}) for run in runs]

    def train(run: Run) -> Outcome:
        made.append(run)
        return outcome_of(run)

    monkeypatch.setattr(sweep, "process_pool", Here)
    monkeypatch.setattr(sweep, "as_completed", ended)
    return made
