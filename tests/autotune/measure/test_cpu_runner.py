"""What a worker does for a CPU: builds, checks and times kernels."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor

from autotune.measure.cpu_runner import CpuRunner
from autotune.measure.problems import WrongResultError
from lowering.cpu.build import Kernel
from ramnet.ops import reference
from schedules.base import Schedule
from schedules.cpu import AddressDecodeBackward
from schedules.workload import Workload

WORKLOAD = Workload(op="address_decode_backward", shape={"R": 32, "U": 2, "P": 4, "K": 4})
RIGHT, WRONG = (AddressDecodeBackward(lanes=8, parallel=parallel) for parallel in (False, True))


@pytest.fixture
def rows() -> list[int]:
    """Record the shape of the logits of each call of a kernel."""
    return []


@pytest.fixture
def runner(rows: list[int]) -> Iterator[CpuRunner]:
    """Kernels that are the reference, with an error of 1 in the last element if they should be wrong."""

    def build(workload: Workload, target: str, schedule: Schedule) -> Kernel:
        def function(grad_weights: Tensor, logits: Tensor, slots: Tensor, weights: Tensor, grad: Tensor) -> None:
            rows.append(len(logits))
            grad.copy_(reference.address_decode_backward(grad_weights, logits, slots, weights))
            grad.view(-1)[-1] += schedule == WRONG

        return Kernel(workload, schedule, function, True)

    before = torch.get_num_threads()
    runner = CpuRunner(build)
    runner.open(WORKLOAD, "cpu", 3)
    yield runner
    torch.set_num_threads(before)


def test_results_are_checked_at_rows_that_are_not_a_multiple_of_any_vector(runner: CpuRunner, rows: list[int]) -> None:
    for schedule in (RIGHT, WRONG):
        runner.build(schedule)
    runner.check(RIGHT)
    with pytest.raises(WrongResultError, match=r"the relative RMSE is \d.*; 1e-05 is allowed") as caught:
        runner.check(WRONG)
    assert caught.value.status == "wrong_result"
    assert rows == [33, 33]


def test_a_kernel_is_timed_with_eager_at_the_requested_sizes(
    runner: CpuRunner, rows: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    calls: dict[str, Any] = {}
    monkeypatch.setattr("autotune.measure.cpu_runner.interleaved", lambda *arguments: calls.update(arguments[0]))
    runner.build(RIGHT)
    runner.measure({"eager": None, "kernel": RIGHT}, rounds=3, seconds=1.0)
    assert torch.equal(calls["kernel"](), calls["eager"]())
    assert rows == [32], "eager is not the kernel"
    assert torch.get_num_threads() == 3
