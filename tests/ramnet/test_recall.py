"""The recall experiment keeps what is done, takes the best of its rates, and reports every model."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from click.testing import CliRunner

from ramnet.recall import plan, report, sweep
from ramnet.recall.cli import recall
from ramnet.recall.plan import RATES, SCALES, Scale, baseline, configurations, orders, ram_net, state_size
from ramnet.recall.sweep import Outcome, Run
from ramnet.training.mqar import Mix, Mqar

SMALL = Scale(
    ((1, 8),), ((1, 8), (2, 16)), search_steps=2, steps=4, batch_size=2, seeds=(0, 1), slots=(4,), key_dims=()
)


def outcome_of(run: Run) -> Outcome:
    """The third rate is the best."""
    best = RATES.index(run.recipe.learning_rate) == 2
    return Outcome(name=run.name, learning_rate=run.recipe.learning_rate, steps=run.recipe.steps or 0,
                   seed=run.recipe.seed, seconds=1.0, accuracies=[0.9 if best else 0.1, 0.5])  # fmt: skip


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

    monkeypatch.setattr(sweep, "ProcessPoolExecutor", Here)
    monkeypatch.setattr(sweep, "as_completed", ended)
    return made


def test_the_best_of_four_rates_is_trained_to_the_end(trained: list[Run], tmp_path: Path) -> None:
    seen: list[Outcome] = []
    outcomes = sweep.sweep(SMALL, tmp_path, 1, seen.append, "")
    names = [name for name, _ in configurations(SMALL)]
    assert len(names) == 3, "two orders and attention"
    assert len(seen) == len(trained) == sweep.count(SMALL) == 3 * (4 + 2)
    assert {run.recipe.steps for run in trained[:12]} == {2} and {run.recipe.steps for run in trained[12:]} == {4}
    assert {outcome.learning_rate for outcome in outcomes} == {1e-2}
    assert [(o.name, o.seed) for o in outcomes] == [(name, seed) for name in names for seed in (0, 1)]


def test_what_is_done_is_not_repeated(trained: list[Run], tmp_path: Path) -> None:
    first = sweep.sweep(SMALL, tmp_path, 1, lambda _: None, "")
    for run, outcome in zip(trained, map(outcome_of, trained), strict=True):
        (tmp_path / f"{run.key()}.json").write_text(outcome.model_dump_json())
    trained.clear()
    again = sweep.sweep(SMALL, tmp_path, 1, lambda _: None, "")
    assert trained == [] and len(again) == len(first)
    path = next(tmp_path.iterdir())
    path.write_text("{}")
    with pytest.raises(ValueError, match=f"^{path} is not an outcome of this experiment: name is missing; delete it"):
        sweep.sweep(SMALL, tmp_path, 1, lambda _: None, "")


def test_each_thing_that_determines_a_run_is_in_its_key() -> None:
    task = Mix((Mqar(1, 8),), (Mqar(1, 8),))
    recipe = sweep.Recipe(steps=2, batch_size=2, seed=0)
    runs = [
        Run("a", ram_net(4, 1), recipe, task), Run("a", ram_net(4, 2), recipe, task),
        Run("a", ram_net(4, 1), recipe.model_copy(update={"seed": 1}), task),
        Run("a", ram_net(4, 1), recipe, Mix((Mqar(1, 10),), (Mqar(1, 8),))),
        Run("a", baseline("gla", 8), recipe, task), Run("a", baseline("deltanet", 8), recipe, task),
    ]  # fmt: skip
    assert len({run.key() for run in runs}) == len(runs)
    assert runs[0].key() == Run("a", ram_net(4, 1), recipe, task).key()


def test_a_run_trains_evaluates_and_writes_its_outcome(tmp_path: Path) -> None:
    task = Mix((Mqar(1, 8),), (Mqar(1, 8), Mqar(2, 16)))
    for config in (ram_net(4, 2), baseline("gla", 8)):
        run = Run("model", config, sweep.Recipe(steps=2, batch_size=2), task)
        threads = torch.get_num_threads()
        outcome = sweep._train(run, tmp_path, "")
        torch.set_num_threads(threads)
        assert outcome == Outcome.model_validate_json((tmp_path / f"{run.key()}.json").read_text())
        assert len(outcome.accuracies) == 2 and all(0 <= x <= 1 for x in outcome.accuracies)


def test_a_mix_draws_as_many_tokens_at_each_setting() -> None:
    mix = Mix((Mqar(1, 8), Mqar(2, 16), Mqar(4, 32)), (Mqar(1, 8),))
    generator = torch.Generator().manual_seed(0)
    shapes = {tuple(mix.batch(12, generator)[0].shape) for _ in range(50)}
    assert shapes == {(12, 8), (6, 16), (3, 32)}


def test_orders_divide_the_same_number_of_slots() -> None:
    assert orders(64) == [1, 2, 3, 6] and orders(256) == [1, 2, 4, 8] and orders(2) == [1]
    for order in orders(256):
        assert [layer.slots for layer in ram_net(256, order).layers] == [256, 256]


def test_states_are_memories_masses_and_last_inputs() -> None:
    assert state_size(ram_net(64, 3), 1000) == 2 * 4 * 64 * (16 + 1)
    assert state_size(baseline("gla", 64), 1000) == 2 * 64 * 64 + 2 * 64
    assert state_size(baseline("attention", 64), 1000) == 2 * 2 * 64 * 1000 + 2 * 64


def test_every_scale_trains_and_tests_settings_that_exist() -> None:
    for scale in SCALES.values():
        assert [Mqar(*setting) for setting in (*scale.trained, *scale.tested)]
        assert len({name for name, _ in configurations(scale)}) == len(list(configurations(scale)))


def test_the_command_writes_a_table_data_and_two_pictures(
    trained: list[Run], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("matplotlib", reason="the pictures need matplotlib: pip install 'ramnet[tune]'")
    monkeypatch.setitem(plan.SCALES, "quick", SMALL)
    done = CliRunner().invoke(recall, ["--output", str(tmp_path)], catch_exceptions=False)
    assert done.exit_code == 0, done.output
    rows = (tmp_path / report.TABLE).read_text().splitlines()
    assert rows[0] == "| model | state | 1 pairs, 8 | 2 pairs, 16 | mean | ± | rate |" and len(rows) == 2 + 3
    assert rows[2] == "| RAM-Net M=4 U=1 | 544 | 0.900 | 0.500 | 0.700 | 0.000 | 0.01 |"
    facts = json.loads((tmp_path / report.DATA).read_text())
    assert [each["family"] for each in facts] == ["RAM-Net", "RAM-Net", "attention"]
    for picture in (report.BY_STATE, report.BY_ORDER):
        assert (tmp_path / picture).read_bytes().startswith(b"\x89PNG")
