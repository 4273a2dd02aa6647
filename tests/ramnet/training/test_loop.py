"""The training loop: it learns, and its learning rate and its run end with its budget."""

import itertools
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from ramnet.loss import IGNORED
from ramnet.training import Recipe, train
from ramnet.training.metrics import FILE, Metrics, read
from ramnet.training.mqar import Mqar
from tests.ramnet.training.runs import RECIPE, TASK, StopsAfter, files, fresh


@pytest.mark.parametrize("kernels", ["cpu"], indirect=True)
def test_recall_is_learnt(kernels: str) -> None:
    result = train(fresh(), TASK, Recipe(steps=400, batch_size=32, warmup_steps=20))
    # Measured over two seeds: at least 0.98; without the gradient of the read weights at most 0.90, of the values
    # 0.90, of the write weights 0.50. A guess among the three values is 0.33.
    assert result.metric > 0.95


def test_the_same_seed_gives_the_same_losses_and_another_does_not() -> None:
    first, again = (train(fresh(), TASK, RECIPE).losses for _ in range(2))
    assert first == again
    assert first != train(fresh(), TASK, RECIPE.model_copy(update={"seed": 6})).losses


def test_the_learning_rate_warms_up_in_steps_and_falls_to_zero_over_either_budget() -> None:
    by_steps = Recipe(steps=100, learning_rate=2.0, warmup_steps=4)
    by_seconds = Recipe(seconds=50.0, learning_rate=2.0, warmup_steps=4)
    assert [by_steps.learning_rate_at(step, 0.0) for step in (0, 1, 3, 9)] == [0.5, 1.0, 2.0, 2.0]
    assert by_steps.spent(50, 1e9) == by_seconds.spent(10**9, 25.0) == 0.5
    assert by_steps.learning_rate_at(50, 0.5) == pytest.approx(1.0)
    assert by_seconds.learning_rate_at(50, by_seconds.spent(50, 49.999)) == pytest.approx(0, abs=1e-6)
    above_zero = Recipe(steps=100, learning_rate=2.0, final_learning_rate=0.5, warmup_steps=0)
    assert [above_zero.learning_rate_at(step, spent) for step, spent in ((0, 0.0), (50, 0.5), (100, 1.0))] == [
        2.0, 1.25, 0.5
    ]  # fmt: skip
    both = Recipe(steps=100, seconds=50.0)
    assert (both.spent(80, 10.0), both.spent(20, 30.0), both.spent(1, 51.0)) == (0.8, 0.6, 1.0)


def test_a_run_stops_when_its_seconds_are_over(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = itertools.count()  # each reading of the clock advances it by a second
    monkeypatch.setattr("ramnet.training.loop.time", SimpleNamespace(monotonic=lambda: float(next(clock))))
    result = train(fresh(), TASK, Recipe(seconds=9.0, batch_size=4))
    # It is read twice before the first step, and twice in each step.
    assert (result.elapsed, result.step, len(result.losses)) == (10.0, 5, 5)


def test_evaluations_take_none_of_the_seconds(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    clock = itertools.count()
    now = SimpleNamespace(monotonic=lambda: float(next(clock)))
    monkeypatch.setattr("ramnet.training.loop.time", now)
    evaluate = type(TASK).evaluate

    def slowly(task: Any, model: Any) -> float:
        for _ in range(100):
            now.monotonic()
        return evaluate(task, model)

    monkeypatch.setattr(type(TASK), "evaluate", slowly)
    often = train(fresh(), TASK, Recipe(seconds=9.0, batch_size=4), output=tmp_path, checkpoint_seconds=0.0)
    # It is read twice before the first step, and once from the end of a checkpoint to that of the next step.
    assert (often.step, often.elapsed) == (8, 9.0)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({}, "neither steps nor seconds"),
        ({"steps": 0}, "steps = 0"),
        ({"seconds": -1.0}, "seconds = -1.0"),
        ({"seconds": float("nan")}, "seconds = nan"),
        ({"steps": 1, "batch_size": 0}, "batch_size = 0"),
        ({"steps": 1, "learning_rate": 0.0}, "learning_rate = 0.0"),
        ({"steps": 1, "final_learning_rate": 0.5}, "final_learning_rate is 0.5; it must be at most learning_rate"),
        ({"steps": 1, "clip_norm": float("inf")}, "clip_norm = inf"),
        ({"steps": 1, "seed": -1}, "seed = -1"),
    ],
)
def test_an_invalid_recipe_is_named(fields: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message) as caught:
        Recipe(**fields)
    assert "\n" not in str(caught.value)


def test_an_output_below_a_file_is_refused_before_any_training(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("mine")
    with pytest.raises(ValueError, match=r"cannot be a folder: .*file is a file"):
        train(fresh(), StopsAfter(3, 12, 64).stop_after(0), RECIPE, output=tmp_path / "file" / "runs")
    assert files(tmp_path) == {"file": b"mine"}


def test_a_speed_is_that_of_its_step_without_the_checkpoint_before(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    now = itertools.count()
    late = [0.0]
    monkeypatch.setattr("ramnet.training.loop.time", SimpleNamespace(monotonic=lambda: next(now) + late[0]))
    monkeypatch.setattr("ramnet.training.checkpoint.save", lambda *_: late.__setitem__(0, late[0] + 1000.0))
    train(fresh(), TASK, Recipe(steps=4, batch_size=4), output=tmp_path, checkpoint_seconds=0)
    assert late[0] == 5000
    speeds = [record["tokens_per_second"] for record in read(tmp_path / FILE)]
    assert min(speeds) > 4 * TASK.length / 10


def test_a_batch_without_labels_changes_nothing_but_by_the_moments() -> None:
    class Silent(Mqar):
        def batch(self, size: int, generator: torch.Generator) -> tuple[torch.Tensor, torch.Tensor]:
            inputs, labels = super().batch(size, generator)
            return inputs, torch.full_like(labels, IGNORED) if size == 4 else labels

    model = fresh()
    before = [x.clone() for x in model.parameters()]
    result = train(model, Silent(3, 12, 64), Recipe(steps=2, batch_size=4))
    assert result.losses == [0.0, 0.0] and result.skipped == 0
    assert all(torch.equal(x, y) for x, y in zip(model.parameters(), before, strict=True))


def test_records_that_nobody_writes_are_not_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    kept: list[Metrics] = []

    class Watched(Metrics):
        def __init__(self, *of: Any) -> None:
            super().__init__(*of)
            kept.append(self)

    monkeypatch.setattr("ramnet.training.loop.Metrics", Watched)
    train(fresh(), TASK, Recipe(steps=3, batch_size=4))
    assert kept[0]._new == []
