"""What a run writes about its steps, and the operations that it counts."""

import io
import json
import math
import re
import sys
from pathlib import Path
from types import ModuleType

import pytest
import torch
from rich.console import Console
from torch.utils.flop_counter import FlopCounterMode

from ramnet import RamNetConfig, RamNetForCausalLM
from ramnet.training import train
from ramnet.training.flops import step_flops
from ramnet.training.metrics import FILE, Metrics, picture, read
from tests.ramnet.training.runs import RECIPE, TASK, PowerCutError, StopsAfter, fresh


@pytest.mark.parametrize("line", ['{"step": 3, "loss": "x"}', '{"step": 3, "loss": [1]}', "[" * 100_000, "{"])
def test_records_are_read_up_to_a_damaged_one(tmp_path: Path, line: str) -> None:
    (tmp_path / FILE).write_text(f'{{"step": 1, "loss": 2}}\n{{"step": 2, "loss": null}}\n{line}\n{{"step": 4}}\n')
    assert [record["step"] for record in read(tmp_path / FILE)] == [1, 2]


def test_every_step_has_a_record(tmp_path: Path) -> None:
    result = train(fresh(), TASK, RECIPE, output=tmp_path, checkpoint_seconds=math.inf)  # evaluates at the end only
    records = read(tmp_path / FILE)
    assert [record["step"] for record in records] == [1, 2, 3, 4, 5, 6, 7]
    assert [record["loss"] for record in records] == result.losses
    assert [record["learning_rate"] for record in records] == [
        RECIPE.learning_rate_at(step, step / 7) for step in range(7)
    ]
    assert all(record["gradient_norm"] > 0 for record in records)
    times = [0.0, *(record["elapsed"] for record in records)]
    for record, before, after in zip(records, times[:-1], times[1:], strict=True):
        assert record["tokens_per_second"] == pytest.approx(4 * 12 / (after - before))
    assert records[-1]["held_out"] == result.metric


def test_a_resumed_run_removes_the_steps_after_its_checkpoint(tmp_path: Path) -> None:
    with pytest.raises(PowerCutError):
        train(fresh(), StopsAfter(3, 12, 64).stop_after(4), RECIPE, output=tmp_path, checkpoint_seconds=0)
    path = tmp_path / FILE
    before = path.read_text()
    assert len(before.splitlines()) == 4
    # What a process that was killed while it wrote may leave.
    path.write_text(before + json.dumps({"step": 5, "loss": 99.0}) + '\n{"step": 6, "lo')
    train(fresh(), TASK, RECIPE, output=tmp_path, resume=True)
    assert path.read_text().startswith(before)
    assert [record["step"] for record in read(path)] == [1, 2, 3, 4, 5, 6, 7]
    assert 99.0 not in [record["loss"] for record in read(path)]


def test_a_new_run_replaces_the_records_of_an_older_one_when_it_writes_its_checkpoint(tmp_path: Path) -> None:
    train(fresh(), TASK, RECIPE, output=tmp_path)
    before = (tmp_path / FILE).read_text()
    with pytest.raises(PowerCutError):
        train(fresh(), StopsAfter(3, 12, 64).stop_after(2), RECIPE, output=tmp_path)
    assert (tmp_path / FILE).read_text() == before
    train(fresh(), TASK, RECIPE.model_copy(update={"steps": 2}), output=tmp_path)
    assert [record["step"] for record in read(tmp_path / FILE)] == [1, 2]


def test_numbers_that_are_not_finite_are_null(tmp_path: Path) -> None:
    metrics = Metrics(tmp_path, 0)
    metrics.add(step=1, loss=math.nan, gradient_norm=math.inf)
    metrics.write()
    assert (tmp_path / FILE).read_text() == '{"step": 1, "loss": null, "gradient_norm": null}\n'


def test_tensorboard_gets_the_records_where_it_is_installed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[tuple] = []

    class SummaryWriter:
        def __init__(self, folder: Path, purge_step: int) -> None:
            calls.append((folder.name, purge_step))

        def add_scalar(self, name: str, value: float, step: int) -> None:
            calls.append((name, value, step))

        def flush(self) -> None:
            calls.append(("flush",))

    module = ModuleType("torch.utils.tensorboard")
    module.SummaryWriter = SummaryWriter  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", module)
    metrics = Metrics(tmp_path, 4)
    metrics.add(step=5, loss=2.0, gradient_norm=math.nan)
    metrics.write()
    metrics.write()
    assert calls == [("tensorboard", 5), ("loss", 2.0, 5), ("flush",), ("flush",)]


def test_the_loss_is_drawn(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("matplotlib", reason="the picture is drawn by matplotlib")
    (tmp_path / FILE).write_text('{"step": 1, "loss": 2.0}\n{"step": 2, "loss": null}\n{"step": 3, "loss": 1.0}\n')
    path = picture(tmp_path)
    assert path is not None and path.read_bytes().startswith(b"\x89PNG")
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    assert picture(tmp_path) is None


@pytest.mark.parametrize("tied", [False, True])
def test_the_operations_of_matrix_products_are_those_that_torch_counts(tied: bool) -> None:
    config = RamNetConfig.preset("tiny", hidden_size=32, value_dim=8, intermediate_size=48, tie_embeddings=tied)
    model, ids = RamNetForCausalLM(config), torch.zeros(2, 6, dtype=torch.int64)
    with FlopCounterMode(display=False) as counter:
        model(ids).logits.sum().backward()
    assert step_flops(model, ids.numel(), ids.numel()) == counter.get_total_flops()


def test_speed_and_share_of_the_peak_are_shown(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("ramnet.training.loop.peak_flops", lambda device, dtype: 1e9)
    screen = Console(record=True, width=140, file=io.StringIO())
    model = fresh()
    train(model, TASK, RECIPE, checkpoint_seconds=0, console=screen)
    said = re.findall(r"^step .* ([\d,]+) tokens/s  ([\d.]+)% of peak  accuracy", screen.export_text(), re.MULTILINE)
    assert len(said) == 7
    for speed, share in said:
        per_second = float(speed.replace(",", ""))
        per_token = step_flops(model, TASK.length, TASK.pairs) / TASK.length
        assert float(share) == pytest.approx(100 * per_second * per_token / 1e9, abs=0.1, rel=0.01)
