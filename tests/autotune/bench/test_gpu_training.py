"""Training steps in a GPU's benchmark: in equal parts, with the same loss."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from autotune.bench.gpu import training
from autotune.bench.gpu.run import GpuRun
from autotune.bench.run import DEFAULT, TUNED
from tests.autotune.bench.conftest import Kernels, forms


def test_training_steps_are_compared_with_the_same_number_of_micro_batches(
    run: GpuRun, kernels: dict[str, Kernels], fla: None, tiny: None
) -> None:
    (table,) = training.step(run, batch=4, tokens=8)
    assert kernels[TUNED].calls["memory_scan_backward"] > table.row(TUNED).runs and not kernels[DEFAULT].calls
    assert forms(table) == {TUNED, training.GLA} and not table.failed
    assert "4 sequences of 8 tokens in 2 parts" in table.what
    assert run.facts[f"{table.name}, {TUNED}, tokens/s"] == pytest.approx(32 / table.row(TUNED).seconds)


def test_a_step_that_runs_out_of_memory_is_divided_into_more_micro_batches(
    run: GpuRun, fla: None, tiny: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    real = training._step

    def step(model: Any, ids: Any, parts: int, device: str) -> Any:
        if parts == 2:
            raise torch.cuda.OutOfMemoryError("CUDA out of memory")
        return real(model, ids, parts, device)

    monkeypatch.setattr(training, "_step", step)
    (table,) = training.step(run, batch=4, tokens=8)
    assert forms(table) == {TUNED, training.GLA} and "in 4 parts" in table.what


def test_kernels_with_other_gradients_are_a_failure(
    run: GpuRun, kernels: dict[str, Kernels], no_fla: None, tiny: None
) -> None:
    kernels[TUNED].off = 9.0
    (table,) = training.step(run, batch=2, tokens=8)
    assert not table.rows
    assert "RAM-Net is wrong: loss and norm of the gradients are" in table.failed[TUNED]


def test_a_training_step_with_another_loss_is_a_failure(run: GpuRun, fla: None, tiny: None, monkeypatch: Any) -> None:
    def other(model: Any, target: str, tuned: bool = True) -> Any:
        return torch.nn.Sequential(model.embedding, torch.nn.Linear(32, 11), Doubled())

    class Doubled(torch.nn.Module):
        def forward(self, x: torch.Tensor) -> Any:
            return (9 * x,)

    monkeypatch.setattr("lowering.compile", other)
    (table,) = training.step(run, batch=2, tokens=8)
    assert forms(table) == {training.GLA} and "RAM-Net is wrong: its loss is" in table.failed[TUNED]
