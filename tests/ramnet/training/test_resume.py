"""A resumed run equals one that was never stopped, and can be extended."""

import itertools
import json
import math
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from ramnet import RamNetForCausalLM
from ramnet.training import train
from ramnet.training.mqar import Mqar
from tests.ramnet.training.runs import RECIPE, SMALL, TASK, PowerCutError, StopsAfter, files, fresh


def test_a_resumed_run_equals_one_that_was_never_stopped(tmp_path: Path) -> None:
    never_stopped = fresh()
    whole = train(never_stopped, TASK, RECIPE)
    with pytest.raises(PowerCutError):
        train(fresh(), StopsAfter(3, 12, 64).stop_after(4), RECIPE, output=tmp_path, checkpoint_seconds=0)
    saved = files(tmp_path)
    resumed = fresh(seed=99)
    rest = train(resumed, TASK, RECIPE, output=tmp_path, resume=True)
    assert rest.losses == whole.losses[4:]
    assert (rest.step, rest.metric) == (whole.step, whole.metric)
    for name, weights in never_stopped.state_dict().items():
        assert torch.equal(weights, resumed.state_dict()[name]), name
    names = ["config.json", "metrics.jsonl", "model.safetensors", "training.safetensors"]
    assert sorted(files(tmp_path)) == sorted(saved) == names
    reloaded = RamNetForCausalLM.from_pretrained(tmp_path)
    assert all(torch.equal(w, reloaded.state_dict()[name]) for name, w in resumed.state_dict().items())


def test_a_finished_run_resumed_makes_no_further_step(tmp_path: Path) -> None:
    whole = train(fresh(), TASK, RECIPE, output=tmp_path)
    again = train(fresh(seed=9), TASK, RECIPE, output=tmp_path, resume=True)
    assert (again.losses, again.step, again.metric) == ([], 7, whole.metric)


LONGER = RECIPE.model_copy(update={"steps": 14})


def test_a_larger_budget_goes_on_past_the_end_on_a_cosine_over_the_new_total(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    finished = train(fresh(), TASK, RECIPE, output=tmp_path)
    rates = []
    monkeypatch.setattr(torch.optim.AdamW, "step", lambda self: rates.append(self.param_groups[0]["lr"]))
    more = train(fresh(seed=9), TASK, LONGER, output=tmp_path, resume=True)
    assert (more.step, len(more.losses)) == (14, 7)
    assert rates == [pytest.approx(0.01 * 0.5 * (1 + math.cos(math.pi * step / 14))) for step in range(7, 14)]
    assert more.elapsed > finished.elapsed


def test_an_extended_run_resumes_exactly(tmp_path: Path) -> None:
    for name in ("whole", "cut"):
        train(fresh(), TASK, RECIPE, output=tmp_path / name)
    whole = train(fresh(), TASK, LONGER, output=tmp_path / "whole", resume=True)
    with pytest.raises(PowerCutError):
        train(
            fresh(), StopsAfter(3, 12, 64).stop_after(3), LONGER,
            output=tmp_path / "cut", resume=True, checkpoint_seconds=0,
        )  # fmt: skip
    rest = train(fresh(), TASK, LONGER, output=tmp_path / "cut", resume=True)
    assert rest.losses == whole.losses[3:] and rest.metric == whole.metric
    weights = (load_file(tmp_path / name / "training.safetensors") for name in ("whole", "cut"))
    first, second = weights
    assert all(torch.equal(x, second[name]) for name, x in first.items())


def test_steps_may_be_followed_by_seconds(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    clock = itertools.count()  # each reading of the clock advances it by a second
    monkeypatch.setattr("ramnet.training.loop.time", SimpleNamespace(monotonic=lambda: float(next(clock))))
    elapsed = train(fresh(), TASK, RECIPE, output=tmp_path).elapsed
    by_seconds = RECIPE.model_copy(update={"steps": None, "seconds": elapsed + 6})
    more = train(fresh(), TASK, by_seconds, output=tmp_path, resume=True)
    # It is read twice before the first step, and twice in each step.
    assert (more.step, more.elapsed) == (7 + 3, elapsed + 6)


@pytest.mark.parametrize(
    ("budget", "message"),
    [
        ({"steps": 6}, "steps is 6 but the run in .* has 7; resume it with the same, or with more"),
        ({"steps": None, "seconds": 1e-9}, "seconds is 1e-09 but the run in .* has None; resume it with the same, or"),
        ({"steps": 7, "seconds": 1e-9}, "seconds is 1e-09 but the run in .* has None; resume it with the same, or"),
    ],
)
def test_a_budget_that_is_spent_already_is_named(tmp_path: Path, budget: dict, message: str) -> None:
    train(fresh(), TASK, RECIPE, output=tmp_path)
    before = files(tmp_path)
    with pytest.raises(ValueError, match=message):
        train(fresh(), TASK, RECIPE.model_copy(update=budget), output=tmp_path, resume=True)
    assert files(tmp_path) == before


@pytest.mark.parametrize("tied", [False, True])
def test_a_resumed_run_keeps_its_dtypes(tmp_path: Path, tied: bool) -> None:
    def mixed(seed: int = 0) -> RamNetForCausalLM:
        torch.manual_seed(seed)
        model = RamNetForCausalLM(SMALL.model_copy(update={"tie_embeddings": tied})).to(torch.bfloat16)
        for module in model.modules():
            if isinstance(module, torch.nn.LayerNorm):
                module.float()
        return model

    whole = train(mixed(), TASK, RECIPE)
    with pytest.raises(PowerCutError):
        train(mixed(), StopsAfter(3, 12, 64).stop_after(4), RECIPE, output=tmp_path, checkpoint_seconds=0)
    resumed = mixed(seed=9).float()
    rest = train(resumed, TASK, RECIPE, output=tmp_path, resume=True)
    assert rest.losses == whole.losses[4:]
    types = {name: x.dtype for name, x in mixed().state_dict().items()}
    assert {name: x.dtype for name, x in resumed.state_dict().items()} == types
    assert (resumed.head.weight is resumed.embedding.weight) == tied
    reloaded = RamNetForCausalLM.from_pretrained(tmp_path).state_dict()
    assert {name: x.dtype for name, x in reloaded.items()} == types


def _cut(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-100])


def _garbled(path: Path) -> None:
    path.write_bytes(b"no tensors here")


def _foreign(path: Path) -> None:
    save_file({"weight": torch.zeros(3)}, path)


def _without_a_tensor(path: Path) -> None:
    with safe_open(path, "pt") as file:
        metadata = file.metadata()
    tensors = load_file(path)
    del tensors["weight.norm.weight"]
    save_file(tensors, path, metadata=metadata)


def _without_moments(path: Path) -> None:
    with safe_open(path, "pt") as file:
        metadata = file.metadata()
    save_file({name: x for name, x in load_file(path).items() if "exp_avg" not in name}, path, metadata=metadata)


def _altered(path: Path, name: str, change: Callable[[torch.Tensor], torch.Tensor]) -> None:
    with safe_open(path, "pt") as file:
        metadata = file.metadata()
    tensors = load_file(path)
    save_file(tensors | {name: change(tensors[name])}, path, metadata=metadata)


def _of_integers(path: Path) -> None:
    _altered(path, "weight.norm.weight", torch.Tensor.int)


def _of_moments_in_another_type(path: Path) -> None:
    _altered(path, "exp_avg_sq.norm.weight", torch.Tensor.half)


def _with_a_nan(path: Path) -> None:
    _altered(path, "exp_avg.norm.weight", lambda x: x * math.nan)


def _with_a_cut_generator(path: Path) -> None:
    _altered(path, "generator", lambda x: x[:-8])


def _of_a_negative_step(path: Path) -> None:
    with safe_open(path, "pt") as file:
        progress = json.loads(file.metadata()["progress"])
    save_file(load_file(path), path, metadata={"progress": json.dumps(progress | {"step": -1})})


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (_cut, "training.safetensors is not a safetensors file"),
        (_garbled, "training.safetensors is not a safetensors file"),
        (_foreign, "training.safetensors is not a training checkpoint"),
        (_without_a_tensor, r"does not fit the model: it lacks weight\.norm\.weight of shape \[32\]"),
        (_without_moments, r"does not fit the model: it lacks exp_avg\.embedding\.weight"),
        (_of_integers, r"training.safetensors: weight\.norm\.weight is torch\.int32; it must be torch\.float32"),
        (_of_moments_in_another_type, r"exp_avg_sq\.norm\.weight is torch\.float16; it must be torch\.float32"),
        (_with_a_nan, r"training.safetensors holds NaN or infinity in exp_avg\.norm\.weight, so the run cannot be"),
        (_with_a_cut_generator, "training.safetensors holds no state of the data's generator"),
        (_of_a_negative_step, "step = -1"),
        (Path.unlink, "holds no training to resume"),
    ],
)
def test_a_damaged_checkpoint_is_named_and_not_changed(tmp_path: Path, damage, message: str) -> None:
    train(fresh(), TASK, RECIPE, output=tmp_path)
    damage(tmp_path / "training.safetensors")
    before, model = files(tmp_path), fresh()
    with pytest.raises(ValueError, match=message) as caught:
        train(model, TASK, RECIPE, output=tmp_path, resume=True)
    assert "\n" not in str(caught.value)
    assert files(tmp_path) == before
    assert all(torch.equal(weights, model.state_dict()[name]) for name, weights in fresh().state_dict().items())


def test_a_run_is_not_resumed_as_another(tmp_path: Path) -> None:
    train(fresh(), TASK, RECIPE, output=tmp_path)
    before = files(tmp_path)
    with pytest.raises(
        ValueError, match=r"learning_rate is 0\.02 but the run in .* has 0\.01; resume it with the same$"
    ):
        train(fresh(), TASK, RECIPE.model_copy(update={"learning_rate": 0.02}), output=tmp_path, resume=True)
    with pytest.raises(ValueError, match=r"pairs is 2 but the run in .* has 3"):
        train(fresh(), Mqar(2, 12, 64), RECIPE, output=tmp_path, resume=True)
    assert files(tmp_path) == before
