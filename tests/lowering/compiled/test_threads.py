"""Threads may share a compiled model, and each chooses its own backend."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from threading import Barrier

import pytest
import torch
from torch import Tensor

import lowering
from ramnet import RamNetForCausalLM, ops
from tests.lowering.compiled.models import ids
from tests.samples import relative_rmse

pytest.importorskip("tvm", reason="the CPU kernels need tvm: pip install 'ramnet[tvm]'")


def test_eight_threads_at_once_get_what_each_gets_alone(fast: RamNetForCausalLM) -> None:
    alone = [fast.generate(ids(1, 5, seed), 12, temperature=0.8, seed=seed) for seed in range(8)]
    together = Barrier(8)

    def run(seed: int) -> list[Tensor]:
        together.wait()
        return [fast.generate(ids(1, 5, seed), 12, temperature=0.8, seed=seed) for _ in range(3)]

    with ThreadPoolExecutor(8) as pool:
        for seed, said in enumerate(pool.map(run, range(8))):
            assert all(torch.equal(each, alone[seed]) for each in said)


def test_another_thread_is_not_limited_to_fewer_graphs(model: RamNetForCausalLM) -> None:
    """More graphs than torch's default limit for a function, in another thread than the one that compiled."""
    fast = lowering.compile(model, backend="eager")

    def train_and_prefill(batch: int) -> float:
        model.requires_grad_(batch % 2 == 0)
        with torch.set_grad_enabled(batch % 3 == 0):
            return relative_rmse(fast(ids(batch, 3 * batch)).logits, model(ids(batch, 3 * batch)).logits)

    with ThreadPoolExecutor(1) as pool:
        assert all(error < 1e-5 for error in pool.map(train_and_prefill, (1, 2, 3, 6)))


def test_overlapping_use_blocks_of_two_threads_do_not_interfere() -> None:
    first_in, second_in, first_out = (Barrier(2, timeout=600) for _ in range(3))
    seen = {}

    def first() -> None:
        with lowering.use("cpu", check=True):
            first_in.wait(), second_in.wait()
            seen["first"] = ops.backend.active()
        seen["first after"] = ops.backend.active()
        first_out.wait()

    def second() -> None:
        first_in.wait()
        with lowering.use("cpu"):
            second_in.wait(), first_out.wait()
            seen["second"] = ops.backend.active()
        seen["second after"] = ops.backend.active()

    with ThreadPoolExecutor(2) as pool:
        for running in [pool.submit(first), pool.submit(second)]:
            running.result()
    assert seen == {"first": "cpu:check", "first after": "", "second": "cpu", "second after": ""}
    assert ops.backend.active() == ""
