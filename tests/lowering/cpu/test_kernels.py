"""Kernels: all schedules compute the same, and bad ones are refused before a build."""

from __future__ import annotations

import itertools
import random
from typing import Any

import pytest
import torch

from ramnet import ops
from schedules.base import Schedule, combinations
from schedules.cpu import SCHEDULES, AddressDecode, MemoryScan, MemoryStep
from schedules.workload import AXES, Op, Workload
from tests import brute_force
from tests.samples import DIFFERENTIABLE, as_backends_take, cotangents, relative_rmse, scan_inputs, step_inputs

tvm = pytest.importorskip("tvm", reason="the CPU kernels need tvm: pip install 'ramnet[tvm]'")

from lowering.cpu.address_decode import module  # noqa: E402 - after the check for tvm
from lowering.cpu.backend import CpuKernels  # noqa: E402 - after the check for tvm
from lowering.cpu.backend import _run as run_on_slots  # noqa: E402
from lowering.cpu.build import cache_key, lower  # noqa: E402
from lowering.cpu.templates import TEMPLATES  # noqa: E402
from lowering.parsing import on_a_short_stack  # noqa: E402

pytestmark = pytest.mark.usefixtures("two_threads")

CONSTANTS = {"decay_power": 0.5, "eps": 1e-6, "proxy_eps": 0.01}


def workload(op: Op, **sizes: int) -> Workload:
    constants = (
        {} if op.startswith("address") else CONSTANTS if op.endswith("backward") else dict(list(CONSTANTS.items())[:2])
    )
    return Workload(op=op, shape=sizes, constants=constants)


def schedules(work: Workload) -> list[Schedule]:
    """Valid schedules that together have every value of every knob of a valid schedule."""
    kind = SCHEDULES[work.op]
    points = combinations(kind, kind.space(work))
    valid = [point for point in points if point.refusal(work) is None]
    random.Random(0).shuffle(valid)
    wanted = {pair for point in valid for pair in point.model_dump().items()}
    chosen = []
    while wanted:
        best = max(valid, key=lambda point: len(wanted & point.model_dump().items()))
        chosen.append(best)
        wanted -= best.model_dump().items()
    return chosen


@pytest.mark.parametrize("unroll", [1, 2])
def test_unrolled_addresses_have_few_loops(unroll: int) -> None:
    """The time that TVM takes to compile the kernel is proportional to their square."""
    work = workload("address_decode", R=64, U=3, P=4, K=8)
    template = on_a_short_stack(module, work, AddressDecode(lanes=16, unroll=unroll, parallel=False))
    assert template.script().count("T.vectorized(") < 30


@pytest.mark.parametrize("op", TEMPLATES)
@pytest.mark.parametrize("size", [1, 2])
def test_no_buffer_is_allocated_in_a_vectorised_loop(op: Op, size: int) -> None:
    """TVM would let all lanes share an element of one that only this loop uses."""
    sizes = dict.fromkeys(AXES[op], size) | ({"R": 300} if "R" in AXES[op] else {})
    work = workload(op, **sizes)
    for schedule in schedules(work):
        template = on_a_short_stack(TEMPLATES[op], work, schedule)
        planned = tvm.s_tir.transform.PlanAndUpdateBufferAllocationLocation()(template).script()
        vectors: list[int] = []  # indentations of the vectorised loops around a line
        for line in planned.splitlines():
            indent = len(line) - len(line.lstrip())
            vectors = [each for each in vectors if each < indent]
            assert not (vectors and "alloc_buffer(" in line), (schedule, line)
            if "in T.vectorized(" in line:
                vectors.append(indent)
        assert planned.count("alloc_buffer(") > 0 or op == "memory_step", planned


class Fixed(CpuKernels):
    """The backend, on one given schedule."""

    def __init__(self, schedule: Schedule) -> None:
        super().__init__()
        self.schedule = schedule

    def kernel(self, op: Op, sizes: tuple[int, ...], dtype: torch.dtype, **constants: float) -> Any:
        return lower(Workload.of(op, sizes, dtype, constants), "cpu", self.schedule)


def test_every_value_of_every_knob_is_tried_with_few_schedules() -> None:
    work = workload("memory_scan", N=3, T=70, K=5, M=24, D=24)
    chosen = schedules(work)
    assert {s.tile for s in chosen} == {4, 6, 8, 12, 24} and {s.chunk for s in chosen} == {16, 64, 256, 1024}
    assert {s.groups for s in chosen} == {1, 2, 4} and {s.unroll for s in chosen} == {1, 2, 4}
    assert len(chosen) <= 7


def test_every_memory_scan_schedule_computes_the_same() -> None:
    inputs = scan_inputs(1, 3, 70, 5, 24, 24, seed=1, access="hot")
    expected = brute_force.memory_scan(inputs, decay_power=0.5)
    for schedule in schedules(workload("memory_scan", N=3, T=70, K=5, M=24, D=24)):
        found = Fixed(schedule).memory_scan(*as_backends_take(inputs.values()), 0.5, 1e-6, 0.01)
        for got, want in zip(found, expected, strict=True):
            assert relative_rmse(got, want) < 1e-5, schedule


def test_every_memory_scan_backward_schedule_computes_the_same() -> None:
    inputs = scan_inputs(1, 3, 70, 5, 24, 24, seed=2, access="hot")
    grads = cotangents(inputs)
    expected = brute_force.memory_scan_gradients(grads, inputs, 0.5)
    for schedule in schedules(workload("memory_scan_backward", N=3, T=70, K=5, M=24, D=24)):
        got = Fixed(schedule).memory_scan_backward(grads, *as_backends_take(inputs.values()), 0.5, 1e-6, 0.01)
        for name, gradient, want in zip(DIFFERENTIABLE, got, expected, strict=True):
            assert relative_rmse(gradient, want) < 1e-5, (schedule, name)


@pytest.mark.parametrize("power", [0.0, 0.25, 0.5, 0.75, 1.0, 1.25, 3.75, 4.0, 0.3, 4.25, 5.0])
def test_decay_by_products_of_roots_is_the_power(power: float) -> None:
    """From 0 to 4 by quarters it is a product, also to the gradient's power γ − 1; some weights are 1."""
    inputs = scan_inputs(1, 2, 20, 3, 8, 4, access="saturated", seed=3)
    grads = cotangents(inputs)
    expected = (
        *brute_force.memory_scan(inputs, decay_power=power), *brute_force.memory_scan_gradients(grads, inputs, power),
    )  # fmt: skip
    arguments = (*as_backends_take(inputs.values()), power, 1e-6, 0.01)
    backend = CpuKernels()
    found = (*backend.memory_scan(*arguments), *backend.memory_scan_backward(grads, *arguments))
    for got, want in zip(found, expected, strict=True):
        assert relative_rmse(got, want) < 1e-5


def test_every_memory_step_schedule_computes_the_same() -> None:
    inputs = scan_inputs(2, 3, 1, 5, 24, 24, seed=4)
    output, memory, mass = brute_force.memory_scan(inputs, decay_power=0.5)
    for schedule in schedules(workload("memory_step", N=6, K=5, M=24, D=24)):
        got = step_inputs(inputs, 0)
        found = Fixed(schedule).memory_step(*as_backends_take(got.values()), 0.5, 1e-6)
        for actual, want in ((found, output[:, :, 0]), (got["memory"], memory), (got["mass"], mass)):
            assert relative_rmse(actual, want) < 1e-5, schedule


# Code is unrolled only for many rows.
@pytest.mark.parametrize(
    ("rows", "order", "sub_dim", "top_k"),
    [(37, 3, 3, 4), (300, 3, 3, 4), (300, 1, 7, 5), (300, 2, 3, 1), (300, 1, 1, 1)],
)
def test_every_address_decode_schedule_and_that_of_its_gradient_computes_the_same(
    rows: int, order: int, sub_dim: int, top_k: int
) -> None:
    logits = torch.randn(rows, order, sub_dim, generator=torch.Generator().manual_seed(5))
    weights, grad_weights, gradient = brute_force.largest_weights(logits, top_k)
    sizes = {"R": rows, "U": order, "P": sub_dim, "K": top_k}
    for schedule in schedules(workload("address_decode", **sizes)):
        got_slots, got_weights = Fixed(schedule).address_decode(logits, top_k)
        assert relative_rmse(got_weights, weights) < 1e-5, schedule
        assert relative_rmse(brute_force.product_softmax(logits).gather(-1, got_slots.long()), weights) < 1e-5, schedule
    for schedule in schedules(workload("address_decode_backward", **sizes)):
        got = Fixed(schedule).address_decode_backward(grad_weights, logits, got_slots, got_weights)
        assert relative_rmse(got, gradient) < 1e-5, schedule


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
        }
        for op, kind in SCHEDULES.items():
            work = Workload(op=op, shape={axis: sizes[axis] for axis in AXES[op]}, constants={})
            assert kind.default(work).refusal(work) is None


def test_lower_refuses_a_gpu() -> None:
    work = workload("memory_scan", N=1, T=64, K=8, M=64, D=64)
    with pytest.raises(ValueError, match="target 'a100' is a GPU; lower builds kernels for 'cpu'"):
        lower(work, "a100", MemoryScan.default(work))


def test_the_key_depends_only_on_what_is_compiled_in(monkeypatch: pytest.MonkeyPatch) -> None:
    work = workload("memory_scan", N=1, T=64, K=8, M=64, D=64)
    schedule = MemoryScan.default(work)
    key = cache_key(work, "cpu", schedule)
    assert cache_key(workload("memory_scan", N=9, T=1000, K=8, M=64, D=64), "cpu", schedule) == key
    assert cache_key(workload("memory_scan", N=1, T=64, K=8, M=128, D=64), "cpu", schedule) != key
    assert cache_key(work.model_copy(update={"constants": {"decay_power": 1.0, "eps": 1e-6}}), "cpu", schedule) != key
    assert cache_key(work, "cpu", schedule.model_copy(update={"chunk": 16})) != key
    assert cache_key(work.model_copy(update={"dtype": "float64"}), "cpu", schedule) != key
    for part in ("cpu_digest", "fingerprint"):
        with monkeypatch.context() as other:
            other.setattr(f"lowering.cpu.build.{part}", lambda *_: "another")
            assert cache_key(work, "cpu", schedule) != key
    assert cache_key(work, "cpu", schedule) == key


def test_kernels_follow_torchs_thread_count() -> None:
    from lowering.cpu import runtime

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
    from lowering.cpu import memory_step

    work = workload("memory_step", N=1, K=2, M=4, D=4)
    text = tvm.ir.save_json(memory_step.module(work, MemoryStep.default(work)))
    assert tvm.ir.load_json(text)["memory_step"] is not None


def test_another_length_uses_the_same_kernel(monkeypatch: pytest.MonkeyPatch) -> None:
    kernels = CpuKernels()
    for tokens in (3, 5):
        kernels.memory_scan(*as_backends_take(scan_inputs(1, 2, tokens, 2, 8, 8).values()), 1.0, 1e-6, 0.01)
    monkeypatch.setattr("lowering.cpu.build._load_or_build", None)
    kernels.memory_scan(*as_backends_take(scan_inputs(1, 2, 9, 2, 8, 8).values()), 1.0, 1e-6, 0.01)


def test_a_kernels_error_that_is_not_of_slots_is_not_swallowed() -> None:
    def broken(*_: Any) -> None:
        raise RuntimeError("broken")

    accesses, *_ = as_backends_take(scan_inputs(1, 1, 1, 1, 1, 1).values())
    with pytest.raises(RuntimeError, match="broken"):
        run_on_slots(broken, (), accesses, 1)


def test_float32_weights_are_never_subnormal() -> None:
    logits = 60.0 * torch.randn(1, 2, 33, 3, 4, generator=torch.Generator().manual_seed(0))
    with ops.using("cpu"):
        _, weights = ops.address_decode(logits, top_k=8)
    smallest = torch.finfo(torch.float32).smallest_normal
    assert not ((weights > 0) & (weights < smallest)).any() and (weights == 0).any()
