"""Steps that are not finite are skipped, and results and checkpoints are always finite."""

import io
import math
import re
from pathlib import Path

import pytest
import torch
from rich.console import Console
from safetensors.torch import load_file

from ramnet import RamNetForCausalLM
from ramnet.training import Recipe, train
from ramnet.training.loop import MOST_SKIPPED, Diverged
from tests.ramnet.training.runs import RECIPE, TASK, PowerCutError, StopsAfter, files, fresh


class Overflows(StopsAfter):
    """The task, some batches of which, identified by their content, give ``model`` an infinite gradient."""

    def of(self, model: RamNetForCausalLM, every: int) -> "Overflows":
        model.head.weight.register_hook(lambda gradient: gradient * (math.inf if self.overflowing else 1))
        object.__setattr__(self, "every", every)
        object.__setattr__(self, "history", [])
        return self.stop_after(10**6)

    @property
    def overflowing(self) -> bool:
        return self.history[-1]

    def batch(self, size: int, generator: torch.Generator) -> tuple[torch.Tensor, torch.Tensor]:
        inputs, labels = super().batch(size, generator)
        if size == RECIPE.batch_size:
            self.history.append(int(inputs.sum()) % self.every == 0)
        return inputs, labels


def overflows(model: RamNetForCausalLM, every: int = 1) -> Overflows:
    return Overflows(3, 12, 64).of(model, every)


def test_a_step_that_is_not_finite_is_skipped(tmp_path: Path) -> None:
    model = fresh()
    result = train(model, overflows(model), RECIPE, output=tmp_path)
    assert (result.step, result.skipped, len(result.losses)) == (7, 7, 7)
    before = fresh().state_dict()
    assert all(torch.equal(weights, before[name]) for name, weights in model.state_dict().items())
    saved = load_file(tmp_path / "training.safetensors")
    assert all(not saved[f"{kind}.embedding.weight"].any() for kind in ("exp_avg", "exp_avg_sq"))
    assert train(fresh(), TASK, RECIPE, output=tmp_path, resume=True).skipped == 7


def test_a_run_interrupted_after_a_skipped_step_resumes_exactly(tmp_path: Path) -> None:
    recipe = RECIPE.model_copy(update={"steps": 12})
    never_stopped, stopped, resumed = fresh(), fresh(), fresh(seed=99)
    task = overflows(never_stopped, every=3)
    whole = train(never_stopped, task, recipe)
    cut = next(i for i in range(2, 12) if task.history[i - 2 : i] == [False, True])  # taken, skipped, cut
    with pytest.raises(PowerCutError):
        train(stopped, overflows(stopped, every=3).stop_after(cut), recipe, output=tmp_path, checkpoint_seconds=0)
    rest = train(resumed, overflows(resumed, every=3), recipe, output=tmp_path, resume=True)
    assert rest.losses == whole.losses[cut - 1 :], "the skipped step is skipped again"
    assert (rest.step, rest.metric, rest.skipped) == (whole.step, whole.metric, whole.skipped)
    assert all(torch.equal(w, resumed.state_dict()[name]) for name, w in never_stopped.state_dict().items())


def test_many_in_a_row_stop_the_run_and_keep_the_last_finite_checkpoint(tmp_path: Path) -> None:
    recipe = RECIPE.model_copy(update={"steps": 100})
    with pytest.raises(PowerCutError):
        train(fresh(), StopsAfter(3, 12, 64).stop_after(4), recipe, output=tmp_path, checkpoint_seconds=0)
    before, model = files(tmp_path), fresh()
    message = (
        rf"^{MOST_SKIPPED} steps in a row were not finite, at step {4 + MOST_SKIPPED} with a loss of \d\.\d+ and a"
        rf" gradient of norm (inf|nan); try a lower learning rate; {re.escape(str(tmp_path))} is left as it is$"
    )
    with pytest.raises(RuntimeError, match=message):
        train(model, overflows(model), recipe, output=tmp_path, resume=True, checkpoint_seconds=0)
    assert files(tmp_path) == before


class OverflowsButOnce(Overflows):
    """All batches overflow except the one that would end the run."""

    @property
    def overflowing(self) -> bool:
        return len(self.history) != MOST_SKIPPED


def test_fewer_in_a_row_do_not_stop_it() -> None:
    model = fresh()
    recipe = RECIPE.model_copy(update={"steps": 2 * MOST_SKIPPED - 1})
    result = train(model, OverflowsButOnce(3, 12, 64).of(model, every=1), recipe)
    assert result.skipped == 2 * MOST_SKIPPED - 2


def test_skipped_steps_are_shown_in_the_progress(tmp_path: Path) -> None:
    model, screen = fresh(), Console(record=True, width=120, file=io.StringIO())
    result = train(model, overflows(model, every=2), RECIPE, checkpoint_seconds=0, console=screen)
    said = [line for line in screen.export_text().splitlines() if line.startswith("step ")]
    assert len(said) == 7 - result.skipped > 0
    assert re.search(rf"accuracy \d\.\d+  {result.skipped} skipped$", said[-1].rstrip())


@pytest.mark.parametrize("learning_rate", [1e20, 3e38])
def test_weights_that_overflow_are_no_result_and_no_checkpoint(
    kernels: str, tmp_path: Path, learning_rate: float
) -> None:
    train(fresh(), TASK, RECIPE, output=tmp_path)
    before = files(tmp_path)
    wild = Recipe(steps=3, batch_size=4, warmup_steps=0, learning_rate=learning_rate)
    expected = rf"(step|after) \d.*; try a lower learning rate; {re.escape(str(tmp_path))} is left as"
    with pytest.raises(Diverged, match=expected):
        train(fresh(), TASK, wild, output=tmp_path)
    assert files(tmp_path) == before


@pytest.mark.parametrize("broken", ["norm.bias", "head.weight"])
def test_a_run_whose_weights_are_not_finite_fails(tmp_path: Path, broken: str) -> None:
    train(fresh(), TASK, RECIPE, output=tmp_path)
    before, model = files(tmp_path), fresh()
    model.get_parameter(broken).data[0] = -math.inf
    for output in (tmp_path, None):
        with pytest.raises(RuntimeError, match=r"weight\.\S+ holds NaN or infinity after 7 steps; try a lower"):
            train(model, TASK, RECIPE, output=output)
    assert files(tmp_path) == before
