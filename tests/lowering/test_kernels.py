"""Kernels: all schedules compute the same, and bad ones are refused before a build."""

from __future__ import annotations

import itertools
import random

import pytest
import torch

from ramnet.ops import reference
from schedules.base import Schedule
from schedules.cpu import SCHEDULES, AddressDecode, MemoryScan, MemoryStep
from schedules.workload import AXES, Op, Workload
from tests.samples import DIFFERENTIABLE, relative_rmse, scan_inputs, step_inputs

tvm = pytest.importorskip("tvm", reason="the CPU kernels need tvm: pip install 'ramnet[tvm]'")

from lowering.cpu import CpuKernels  # noqa: E402 - after the check for tvm
from lowering.kernels import cache_key, lower  # noqa: E402

CONSTANTS = {"decay_power": 0.5, "eps": 1e-6, "proxy_eps": 0.01}


def workload(op: Op, **sizes: int) -> Workload:
    constants = (
        {} if op.startswith("address") else CONSTANTS if op.endswith("backward") else dict(list(CONSTANTS.items())[:2])
    )
    return Workload(op=op, shape=sizes, constants=constants)


def every_schedule(work: Workload, at_most: int) -> list[Schedule]:
    """Valid points of the space: all, or a seeded sample."""
    kind = SCHEDULES[work.op]
    space = kind.space(work)
    points = [kind(**dict(zip(space, values, strict=True))) for values in itertools.product(*space.values())]
    valid = [point for point in points if point.refusal(work) is None]
    return random.Random(0).sample(valid, min(at_most, len(valid)))


class Fixed(CpuKernels):
    """The backend, on one given schedule."""

    def __init__(self, schedule: Schedule) -> None:
        super().__init__()
        self.schedule = schedule

    def kernel(self, op, sizes, dtype, **constants):
        work = Workload(op=op, shape=dict(zip(AXES[op], sizes, strict=True)), constants=constants)
        return lower(work, "cpu", self.schedule)


def test_every_memory_scan_schedule_computes_the_same() -> None:
    inputs = list(scan_inputs(1, 3, 70, 5, 24, 24, seed=1, access="hot").values())
    expected = reference.memory_scan(*inputs, 0.5, 1e-6, 0.01)
    for schedule in every_schedule(workload("memory_scan", N=3, T=70, K=5, M=24, D=24), 10):
        for got, want in zip(Fixed(schedule).memory_scan(*inputs, 0.5, 1e-6, 0.01), expected, strict=True):
            assert relative_rmse(got, want) < 1e-5, schedule


def test_every_memory_scan_backward_schedule_computes_the_same() -> None:
    tensors = scan_inputs(1, 3, 70, 5, 24, 24, seed=2, access="hot")
    inputs = list(tensors.values())
    generator = torch.Generator().manual_seed(3)
    grads = [torch.randn(tensors[name].shape, generator=generator) for name in ("values", "memory", "mass")]
    expected = reference.memory_scan_backward(*grads, *inputs, 0.5, 1e-6, 0.01)
    for schedule in every_schedule(workload("memory_scan_backward", N=3, T=70, K=5, M=24, D=24), 6):
        got = Fixed(schedule).memory_scan_backward(*grads, *inputs, 0.5, 1e-6, 0.01)
        for name, gradient, want in zip(DIFFERENTIABLE, got, expected, strict=True):
            assert relative_rmse(gradient, want) < 1e-5, (schedule, name)


def test_every_memory_step_schedule_computes_the_same() -> None:
    tensors = scan_inputs(2, 3, 1, 5, 24, 24, seed=4)
    expected = step_inputs(tensors, 0)
    output = reference.memory_step(*expected.values(), 0.5, 1e-6)
    for schedule in every_schedule(workload("memory_step", N=6, K=5, M=24, D=24), 8):
        got = step_inputs(tensors, 0)
        assert relative_rmse(Fixed(schedule).memory_step(*got.values(), 0.5, 1e-6), output) < 1e-5, schedule
        for name in ("memory", "mass"):
            assert relative_rmse(got[name], expected[name]) < 1e-5, schedule


def test_every_address_decode_schedule_computes_the_same() -> None:
    logits = torch.randn(37, 3, 3, generator=torch.Generator().manual_seed(5))
    slots, weights = reference.address_decode(logits, 4)
    for schedule in every_schedule(workload("address_decode", R=37, U=3, P=3, K=4), 10):
        got_slots, got_weights = Fixed(schedule).address_decode(logits, 4)
        assert torch.equal(got_slots, slots), schedule
        assert relative_rmse(got_weights, weights) < 1e-5, schedule


@pytest.mark.parametrize(
    ("schedule", "work", "reason"),
    [
        (MemoryScan(tile=5, groups=1, chunk=64, unroll=1), workload("memory_scan", N=1, T=1, K=8, M=16, D=64),
         "tile is 5, which does not divide D / groups = 64"),
        (MemoryScan(tile=8, groups=3, chunk=64, unroll=1), workload("memory_scan", N=1, T=1, K=8, M=16, D=64),
         "groups is 3, which does not divide D = 64"),
        (MemoryScan(tile=8, groups=1, chunk=0, unroll=1), workload("memory_scan", N=1, T=1, K=8, M=16, D=64),
         "chunk is 0"),
        (MemoryStep(tile=8, unroll=9, parallel=False, prefetch=0), workload("memory_step", N=1, K=8, M=16, D=64),
         "unroll is 9; it must be in 1..K = 8"),
        (AddressDecode(lanes=256, unroll=0, parallel=False), workload("address_decode", R=1, U=5, P=4, K=8),
         "256 lanes are 1024 bytes"),
        (AddressDecode(lanes=16, unroll=1, parallel=False), workload("address_decode", R=1, U=1, P=64, K=64),
         "exchanges a sub-vector are more than"),
    ],
)  # fmt: skip
def test_bad_schedules_are_refused_before_a_build(schedule: Schedule, work: Workload, reason: str) -> None:
    with pytest.raises(ValueError, match=reason):
        lower(work, "cpu", schedule)


def test_default_schedules_are_valid_for_any_sizes() -> None:
    for top_k, value_dim, sub_dim, order in itertools.product((1, 8, 243), (1, 37, 64), (2, 5), (1, 6)):
        sizes = {
            "N": 3,
            "T": 7,
            "R": 9,
            "K": top_k,
            "M": 1024,
            "D": value_dim,
            "P": sub_dim,
            "U": order,
            "O": 3,
            "I": value_dim,
            "C": 12,
            "H": 3,
        }
        for op, kind in SCHEDULES.items():
            work = Workload(op=op, shape={axis: sizes[axis] for axis in AXES[op]}, constants={})
            assert kind.default(work).refusal(work) is None


def test_key_depends_on_what_is_compiled_in_and_on_nothing_else() -> None:
    work = workload("memory_scan", N=1, T=64, K=8, M=64, D=64)
    schedule = MemoryScan.default(work)
    key = cache_key(work, "cpu", schedule)
    assert cache_key(workload("memory_scan", N=9, T=1000, K=8, M=64, D=64), "cpu", schedule) == key
    assert cache_key(workload("memory_scan", N=1, T=64, K=8, M=128, D=64), "cpu", schedule) != key
    assert cache_key(work.model_copy(update={"constants": {"decay_power": 1.0, "eps": 1e-6}}), "cpu", schedule) != key
    assert cache_key(work, "cpu", schedule.model_copy(update={"chunk": 16})) != key


def test_kernels_follow_torchs_thread_count() -> None:
    from lowering import runtime

    threads = tvm.get_global_func("runtime.NumThreads")
    before = torch.get_num_threads()
    try:
        for count in (1, 2):
            torch.set_num_threads(count)
            runtime.match_threads()
            assert threads() == count
    finally:
        torch.set_num_threads(before)
        runtime.match_threads()


def test_modules_can_be_saved_as_json() -> None:
    """apache-tvm-ffi 0.1.15 crashes here; the pinned version does not."""
    from lowering.tir import memory_step

    work = workload("memory_step", N=1, K=2, M=4, D=4)
    text = tvm.ir.save_json(memory_step.module(work, MemoryStep.default(work)))
    assert tvm.ir.load_json(text)["memory_step"] is not None


def test_another_length_takes_the_kernel_that_is_there(monkeypatch: pytest.MonkeyPatch) -> None:
    kernels = CpuKernels()
    for tokens in (3, 5):
        kernels.memory_scan(*scan_inputs(1, 2, tokens, 2, 8, 8).values(), 1.0, 1e-6, 0.01)
    monkeypatch.setattr("lowering.kernels._load_or_build", None)
    kernels.memory_scan(*scan_inputs(1, 2, 9, 2, 8, 8).values(), 1.0, 1e-6, 0.01)
