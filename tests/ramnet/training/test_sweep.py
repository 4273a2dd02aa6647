"""A sweep keeps what is done, takes the best of its rates, and trains each model to the end."""

from __future__ import annotations

import dataclasses
import json
import math
import multiprocessing
import shutil
from pathlib import Path

import pytest
import torch

from ramnet.ops.checks import LogitsError
from ramnet.recall.plan import baseline, ram_net
from ramnet.training import sweep
from ramnet.training.mqar import Mix, Mqar
from ramnet.training.recipe import Recipe
from ramnet.training.sweep import RATES, Outcome, Run, Sweep
from tests.ramnet.training.sweeps import outcome_of, trained

__all__ = ["trained"]

TASK = Mix((Mqar(1, 8),), (Mqar(1, 8), Mqar(2, 16)))
SEARCH, FINAL = Recipe(steps=2, batch_size=2), Recipe(steps=4, batch_size=2)
MODELS = {"first": ram_net(4, 1), "second": ram_net(4, 2)}
SWEEP = Sweep(MODELS, TASK, SEARCH, FINAL, seeds=(0, 1))


def test_the_best_of_four_rates_is_trained_to_the_end(trained: list[Run], tmp_path: Path) -> None:
    seen: list[Outcome] = []
    outcomes = SWEEP.run(tmp_path, 1, "", seen.append)
    assert len(seen) == len(trained) == len(SWEEP) == 2 * (4 + 2)
    assert {run.recipe.steps for run in trained[:8]} == {2} and {run.recipe.steps for run in trained[8:]} == {4}
    assert not any(run.scored for run in trained[:8]) and all(run.scored for run in trained[8:])
    assert {outcome.learning_rate for outcome in outcomes} == {1e-2}
    assert [(o.name, o.seed) for o in outcomes] == [(name, seed) for name in MODELS for seed in (0, 1)]
    assert trained[-1] == SWEEP.final_run("second", 1e-2, 1)


def test_the_best_may_be_the_lowest(trained: list[Run], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Mix, "best", "lowest")
    every = dataclasses.replace(SWEEP, finalists=4)
    assert {outcome.learning_rate for outcome in every.run(tmp_path, 1, "", lambda _: None)} == {RATES[0]}


def test_the_least_loss_of_the_search_is_trained_to_the_end_whatever_its_metric(
    trained: list[Run], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As long as no model has begun to recall, accuracies are chance."""

    def found(run: Run) -> Outcome:
        loss = 9.1 if run.recipe.learning_rate == 3.2e-2 else 9.2
        return outcome_of(run).model_copy(update={"loss": loss, "metric": 0.5 if run.scored else 0.0001})

    monkeypatch.setattr("tests.ramnet.training.sweeps.outcome_of", found)
    SWEEP.run(tmp_path, 1, "", lambda _: None)
    assert {run.recipe.learning_rate for run in trained if run.scored} == {3.2e-2}


def test_the_best_of_several_finalists_is_taken(
    trained: list[Run], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In the search the third rate is the best and the fourth the next; at the end it is the other way round."""

    def found(run: Run) -> Outcome:
        place = RATES.index(run.recipe.learning_rate)
        metric = (0.1, 0.2, 0.7, 0.9)[place] if run.scored else (0.1, 0.2, 0.7, 0.6)[place]
        return outcome_of(run).model_copy(update={"loss": 1 - metric, "metric": metric})

    monkeypatch.setattr("tests.ramnet.training.sweeps.outcome_of", found)
    several = dataclasses.replace(SWEEP, finalists=2)
    outcomes = several.run(tmp_path, 1, "", lambda _: None)
    assert len(trained) == len(several) == 2 * (4 + 2 * 2)
    assert [(o.name, o.learning_rate, o.seed) for o in outcomes] == [
        (name, 3.2e-2, seed) for name in MODELS for seed in (0, 1)
    ]


def test_the_next_best_rate_is_trained_to_the_end_if_a_model_ends_worse_than_in_its_search(
    trained: list[Run], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The third rate is the best of the search, the second and the fourth are equal."""

    def unlucky(run: Run) -> Outcome:
        found = outcome_of(run)
        ends = {("first", 1e-2): 0.1, ("first", 3.2e-3): 0.6, ("second", 1e-2): None}
        at = ends.get((run.name, run.recipe.learning_rate), 0.15)
        return found.model_copy(update={"metric": at}) if run.scored else found

    monkeypatch.setattr("tests.ramnet.training.sweeps.outcome_of", unlucky)
    outcomes = SWEEP.run(tmp_path, 1, "", lambda _: None)
    assert [(o.name, o.learning_rate, o.metric) for o in outcomes if o.seed == 0] == [
        ("first", 3.2e-3, 0.6), ("second", 3.2e-3, 0.15)
    ]  # fmt: skip
    final = [(run.name, run.recipe.learning_rate) for run in trained if run.scored and run.recipe.seed == 0]
    assert final[:4] == [("first", 1e-2), ("second", 1e-2), ("first", 3.2e-3), ("second", 3.2e-3)]
    assert final[4:] == [("first", 3.2e-2), ("second", 3.2e-2), ("first", 1e-3), ("second", 1e-3)]


def test_what_diverges_is_left_out(trained: list[Run], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def diverging(run: Run) -> Outcome:
        found = outcome_of(run)
        return found if run.name == "second" else found.model_copy(update={"loss": None, "metric": None, "scores": []})

    monkeypatch.setattr("tests.ramnet.training.sweeps.outcome_of", diverging)
    outcomes = SWEEP.run(tmp_path, 1, "", lambda _: None)
    assert [(o.name, o.seed) for o in outcomes] == [("second", 0), ("second", 1)]


def test_what_is_done_is_not_repeated(trained: list[Run], tmp_path: Path) -> None:
    first = SWEEP.run(tmp_path, 1, "", lambda _: None)
    for run in trained:
        (tmp_path / f"{run.key()}.json").write_text(outcome_of(run).model_dump_json())
    trained.clear()
    assert SWEEP.run(tmp_path, 1, "", lambda _: None) == first and trained == []
    path = next(tmp_path.iterdir())
    path.write_text("{}")
    with pytest.raises(ValueError, match=f"^{path} is not an outcome of this experiment: name is missing; delete it"):
        SWEEP.run(tmp_path, 1, "", lambda _: None)


def test_the_same_training_under_another_name_is_not_repeated(trained: list[Run], tmp_path: Path) -> None:
    """As of two scales that share a model and a folder."""
    SWEEP.run(tmp_path, 1, "", lambda _: None)
    for run in trained:
        (tmp_path / f"{run.key()}.json").write_text(outcome_of(run).model_dump_json())
    trained.clear()
    renamed = dataclasses.replace(SWEEP, models={f"the {name}": config for name, config in MODELS.items()})
    assert {outcome.name for outcome in renamed.run(tmp_path, 1, "", lambda _: None)} == {"the first", "the second"}
    assert not trained
    both = dataclasses.replace(SWEEP, models=MODELS | {"second again": MODELS["second"]})
    names = [outcome.name for outcome in both.run(tmp_path, 1, "", lambda _: None) if outcome.seed == 0]
    assert names == ["first", "second", "second again"]


@pytest.mark.parametrize("change", [{"learning_rate": 0.5}, {"steps": 9}, {"seed": 9}, {"scores": []}])
def test_an_outcome_of_another_run_is_refused(trained: list[Run], tmp_path: Path, change: dict[str, object]) -> None:
    SWEEP.run(tmp_path, 1, "", lambda _: None)
    run = next(run for run in trained if run.scored)
    path = tmp_path / f"{run.key()}.json"
    path.write_text(outcome_of(run).model_copy(update=change).model_dump_json())
    with pytest.raises(ValueError, match=f"^{path} is not the outcome of {run.name} at rate .*; delete it$"):
        SWEEP.run(tmp_path, 1, "", lambda _: None)
    path.write_text(outcome_of(run).model_dump_json().replace('"metric":', '"metric":NaN,"ignored":'))
    with pytest.raises(ValueError, match="is not an outcome of this experiment: metric"):
        SWEEP.run(tmp_path, 1, "", lambda _: None)


def test_each_thing_that_determines_a_run_is_in_its_key() -> None:
    task = Mix((Mqar(1, 8),), (Mqar(1, 8),))
    runs = [
        Run("a", ram_net(4, 1), SEARCH, task, False), Run("a", ram_net(4, 2), SEARCH, task, False),
        Run("a", ram_net(4, 1), SEARCH.model_copy(update={"seed": 1}), task, False),
        Run("a", ram_net(4, 1), SEARCH, Mix((Mqar(1, 10),), (Mqar(1, 8),)), False),
        Run("a", ram_net(4, 1), SEARCH, task, True),
        Run("a", baseline("gla", 8), SEARCH, task, False), Run("a", baseline("deltanet", 8), SEARCH, task, False),
    ]  # fmt: skip
    assert len({run.key() for run in runs}) == len(runs)
    assert runs[0].key() == Run("another name", ram_net(4, 1), SEARCH, task, False).key()


def test_a_run_trains_evaluates_and_writes_its_outcome(tmp_path: Path, kept_memory: list[bool]) -> None:
    for config, scored in ((ram_net(4, 2), True), (baseline("gla", 8), False)):
        run = Run("model", config, SEARCH, TASK, scored)
        threads = torch.get_num_threads()
        outcome = sweep._train(run, tmp_path, "")
        torch.set_num_threads(threads)
        assert outcome == Outcome.model_validate_json((tmp_path / f"{run.key()}.json").read_text())
        assert len(outcome.scores) == (2 if scored else 0) and 0 <= outcome.metric <= 1
        records = (tmp_path / run.key() / "metrics.jsonl").read_text().splitlines()
        assert outcome.loss == json.loads(records[-1])["loss"]  # of 2 steps, the last
        if scored:
            assert outcome.metric == sum(outcome.scores) / 2
    assert len(kept_memory) == 2


def test_a_finished_run_without_the_losses_of_its_steps_is_no_diverged_one(
    tmp_path: Path, kept_memory: list[bool]
) -> None:
    run = Run("model", ram_net(4, 2), SEARCH, TASK, False)
    outcome = sweep._train(run, tmp_path, "")
    path = tmp_path / run.key() / "metrics.jsonl"
    path.write_text(path.read_text().splitlines(keepends=True)[0])
    with pytest.raises(ValueError, match=f"^{path} has the losses of 1 of 2 steps; delete .* to train anew$"):
        sweep._train(run, tmp_path, "")
    shutil.rmtree(path.parent)
    again = sweep._train(run, tmp_path, "")
    assert (again.loss, again.metric) == (outcome.loss, outcome.metric)


@pytest.mark.parametrize("scores", [None, [0.5, math.nan]])
def test_a_model_whose_scores_are_undefined_diverged(
    tmp_path: Path, kept_memory: list[bool], monkeypatch: pytest.MonkeyPatch, scores: list[float] | None
) -> None:
    def refused(*_: object) -> list[float]:
        if scores is None:
            raise LogitsError("logits[0] has nan as its largest entry; it must be finite")
        return scores

    monkeypatch.setattr(type(TASK), "scores", refused)
    outcome = sweep._train(Run("model", ram_net(4, 2), SEARCH, TASK, True), tmp_path, "")
    assert (outcome.loss, outcome.metric, outcome.scores) == (None, None, [])


def test_an_interrupted_sweep_ends_its_processes_at_once(tmp_path: Path) -> None:
    """The first of two runs side by side ends, and the other would go on for days."""

    def interrupt(outcome: Outcome) -> None:
        raise KeyboardInterrupt

    runs = [
        Run("model", ram_net(4, 1), SEARCH.model_copy(update={"steps": steps}), TASK, False) for steps in (1, 10**9)
    ]
    others = multiprocessing.active_children()
    with pytest.raises(KeyboardInterrupt):
        sweep._outcomes(runs, tmp_path, 2, "", interrupt)
    assert set(multiprocessing.active_children()) <= set(others)
