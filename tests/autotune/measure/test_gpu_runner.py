"""Measuring on a GPU, with a simulated device and interpreted kernels."""

from __future__ import annotations

import gc
import itertools
import weakref
from functools import partial
from typing import Any

import pytest
import torch
from torch.utils._pytree import tree_leaves

from autotune.bench import eager_scan_gradients
from autotune.measure import cuda_clock, eager_scan
from autotune.measure.cuda_clock import CudaClock
from autotune.measure.eager_decode_heads import EAGER, separated
from autotune.measure.gpu_runner import Eager, GpuRunner
from autotune.measure.problems import TOLERANCE, Problem, WrongResultError, checked
from autotune.measure.timing import HostClock, interleaved, ratio
from lowering.gpu.decode_heads.options import MixerOptions
from schedules.base import Schedule
from schedules.workload import AXES, Workload
from tests.decode_heads import EPS, POWER, TEMPERATURE, Sizes, random_inputs
from tests.decode_heads import expected as brute_force
from tests.samples import relative_rmse

SIZES = {"R": 9, "U": 3, "P": 3, "N": 2, "T": 7, "K": 4, "M": 27, "D": 5}


def workload(op: Any, dtype: Any = "bfloat16", **sizes: int) -> Workload:
    return Workload(op=op, shape={axis: (SIZES | sizes)[axis] for axis in AXES[op]}, dtype=dtype)


class Device:
    """A simulated device that runs queued work of given milliseconds asynchronously."""

    def __init__(self) -> None:
        self.now, self.waits, self.log, self.host = 0.0, 0, [], 0.0

    def work(self, name: str, milliseconds: float) -> None:
        self.log.append(name)
        self.now += milliseconds

    def synchronize(self) -> None:
        self.waits += 1

    def Event(self, enable_timing: bool) -> Any:  # noqa: N802 as torch.cuda calls it
        device = self

        class Event:
            def record(self) -> None:
                self.at = device.now

            def elapsed_time(self, end: Any) -> float:
                assert device.waits, "an event was read before the device was waited for"
                return end.at - self.at

        return Event()


@pytest.fixture
def device() -> Device:
    return Device()


@pytest.fixture
def clock(device: Device) -> CudaClock:
    """A clock whose flush takes 2 ms on the device; ``device.host`` is the host's time in seconds."""
    device.host = 7.0
    clock = CudaClock(lambda: device.work("flush", 2.0), device, lambda: device.host)
    device.log.clear()
    device.waits = 0
    return clock


def test_each_call_is_timed_without_the_flush_before_it(device: Device, clock: CudaClock) -> None:
    assert clock.seconds(lambda: device.work("call", 2.0), 3) == pytest.approx(6e-3)
    assert device.log == ["flush", "call"] * 3


def test_the_host_synchronises_once_per_sample(device: Device, clock: CudaClock) -> None:
    clock.seconds(lambda: device.work("call", 2.0), 50)
    assert device.waits == 1


def test_the_clock_holds_no_reference_to_a_call(clock: CudaClock) -> None:
    held = torch.ones(1)
    call = partial(torch.neg, held)
    clock.seconds(call, 1)
    gone = weakref.ref(call)
    del call
    assert gone() is None and len(clock.queueing) <= 1, "at most the clock's own write"


@pytest.mark.parametrize(("queueing", "writes"), [(1e-3, 1), (5e-3, 3), (1.0, 6)])
def test_the_device_is_busy_while_the_host_queues_a_call_but_not_for_ever(
    device: Device, clock: CudaClock, queueing: float, writes: int
) -> None:
    def call() -> None:
        device.host += queueing
        device.work("call", 1.0)

    clock.seconds(call, 1)
    assert device.log == ["flush", "call"], "its queueing time is not known yet"
    device.log.clear()
    assert clock.seconds(call, 2) == pytest.approx(2e-3)
    assert device.log == [*["flush"] * writes, "call"] * 2


def test_candidates_are_compared_by_the_devices_time(device: Device, clock: CudaClock) -> None:
    calls = {name: (lambda t=t: device.work("call", t)) for name, t in (("short", 0.01), ("long", 0.03))}
    timings = interleaved(calls, rounds=5, seconds=5, clock=clock)
    assert timings["short"].median == pytest.approx(1e-5)
    assert ratio(timings, of="long", over="short").median == pytest.approx(3)
    assert timings["short"].runs >= 5 * 100, "a sample fills a millisecond"


OPS = (
    "address_decode",
    "address_decode_backward",
    "memory_scan",
    "memory_scan_backward",
    "memory_step",
    "decode_heads",
)


@pytest.mark.parametrize("op", OPS)
def test_the_eager_forms_in_bfloat16_are_near_float64(op: str) -> None:
    problem = Problem(workload(op))
    assert problem.error(Eager()) < TOLERANCE["bfloat16"]
    assert {x.dtype for x in problem.expected if x.is_floating_point()} == {torch.float64}


@pytest.mark.parametrize("op", ["memory_scan", "memory_step", "memory_scan_backward", "decode_heads"])
def test_narrow_values_have_a_state_in_float32(op: str) -> None:
    arguments = tree_leaves(Problem(workload(op)).arguments)
    floating = [x.dtype for x in arguments if isinstance(x, torch.Tensor) and x.is_floating_point()]
    assert set(floating) == {torch.bfloat16, torch.float32}


def test_a_fused_token_agrees_with_its_parts_at_any_position() -> None:
    projected, log_scale, position, memory, mass, *rest = Problem(workload("decode_heads", "float64")).arguments
    first, later = memory.clone(), memory.clone()
    EAGER.decode_heads(projected, log_scale, position, first, mass.clone(), *rest)
    EAGER.decode_heads(projected, log_scale, position + memory.shape[2], later, mass.clone(), *rest)
    assert torch.equal(first, later), "CAPE shifts modulo M"
    EAGER.decode_heads(projected, log_scale, position + 1, later, mass.clone(), *rest)
    assert not torch.equal(first, later)


@pytest.mark.parametrize("cape_heads", [0, 1, 2])
def test_a_fused_token_equals_the_papers_definition(cape_heads: int) -> None:
    sizes = Sizes(batch=3, heads=2, order=2, sub_dim=3, top_k=4, width=5)
    inputs = random_inputs(sizes, torch.float64, torch.float64, position=4)
    expected = brute_force(inputs, sizes, cape_heads)
    output = EAGER.decode_heads(*inputs.values(), MixerOptions(2, 3, 4, cape_heads, TEMPERATURE, POWER, EPS))
    for mine, right in zip((output, inputs["memory"], inputs["mass"]), expected, strict=True):
        assert relative_rmse(mine, right) < 1e-12


def test_with_all_addresses_there_is_no_next_one_to_compare() -> None:
    drawn = torch.zeros(1, 2, 1, 2, 3)
    assert separated(lambda: drawn, torch.zeros(2, 1), top_k=9) is drawn


def test_the_last_address_of_a_fused_token_is_not_a_tie() -> None:
    projected, log_scale, *_ = Problem(workload("decode_heads", N=64)).arguments
    logits = projected[:, : 2 * 16 * 9].view(4, 2, 16, 3, 3).double() * log_scale.double().exp()[..., None, None]
    _, weights = EAGER.address_decode(logits, 5)
    assert bool((weights[..., 4] < 0.985 * weights[..., 3]).all())


class Twofold(Schedule):
    """A schedule whose kernels are the reference, times ``factor``."""

    factor: float = 1.0

    def refusal(self, workload: Workload) -> str | None:
        return "factor is below 0; it must not be" if self.factor < 0 else None


@pytest.fixture
def runner(monkeypatch: pytest.MonkeyPatch) -> GpuRunner:
    class Kernels:
        def __init__(self, target: str, given: dict[str, Twofold]) -> None:
            self.factor = given["memory_step"].factor

        def memory_step(self, *arguments: Any) -> torch.Tensor:
            called.append(self)
            return EAGER.memory_step(*arguments) * self.factor

    called: list[Kernels] = []

    monkeypatch.setattr("autotune.measure.gpu_runner.GpuKernels", Kernels)
    captures = itertools.count()
    runner = GpuRunner("cpu", HostClock(), lambda call: (next(captures), call)[1])
    runner.captures, runner.called = captures, called  # type: ignore[attr-defined]
    runner.open(workload("memory_step"), "h200", 1)
    return runner


def test_a_candidate_is_built_checked_and_timed_beside_eager(runner: GpuRunner) -> None:
    good = Twofold()
    runner.build(good)
    runner.build(good)
    assert len(runner.called) == 1, "it is compiled once, by the first call"  # type: ignore[attr-defined]
    runner.check(good)
    assert len(runner.called) == 2  # type: ignore[attr-defined]
    timings = runner.measure({"eager": None, "good": good}, rounds=3, seconds=0.1)
    assert set(timings) == {"eager", "good"} and all(timing.median > 0 for timing in timings.values())
    assert next(runner.captures) == 1, "the kernel is captured, the eager form is not"  # type: ignore[attr-defined]


def test_a_captured_graph_keeps_what_it_uses(monkeypatch: pytest.MonkeyPatch) -> None:
    """A graph has addresses only: without the model whose memory it reads, a replay would fault."""
    monkeypatch.setattr(cuda_clock, "record_cuda", lambda run, rehearse: (lambda: None, torch.zeros(1)))
    model = torch.nn.Linear(2, 2)
    kept = weakref.ref(model)
    replay = cuda_clock.captured(partial(model, torch.ones(2)))
    del model
    gc.collect()
    assert kept() is not None
    replay()
    del replay
    gc.collect()
    assert kept() is None


def test_wrong_numbers_and_refused_schedules_are_errors(runner: GpuRunner) -> None:
    runner.build(Twofold(factor=1.1))
    with pytest.raises(WrongResultError, match=r"1\.0e-01; 6e-03 is allowed"):
        runner.check(Twofold(factor=1.1))
    with pytest.raises(ValueError, match="memory_step: factor is below 0"):
        runner.build(Twofold(factor=-1.0))


def test_candidates_are_checked_at_odd_sizes() -> None:
    assert checked(workload("memory_scan", T=4096, N=256)).shape == {"N": 4, "T": 1061, "K": 4, "M": 27, "D": 5}


@pytest.mark.parametrize("scan", [eager_scan.scan_by_slots, eager_scan.scan_in_place, eager_scan.scan_chunked])
def test_eager_forms_stay_on_the_device_of_their_inputs(scan: Any) -> None:
    *tensors, decay_power, eps, _ = (
        x.to("meta") if isinstance(x, torch.Tensor) else x
        for x in tree_leaves(Problem(workload("memory_scan")).arguments)
    )
    found = scan(*eager_scan.as_state(tensors), decay_power, eps)
    assert [x.device.type for x in found] == ["meta"] * 3


def test_eager_forms_with_gradients_stay_on_the_device_of_their_inputs() -> None:
    *tensors, decay_power, eps, proxy_eps = (
        x.to("meta") if isinstance(x, torch.Tensor) else x
        for x in tree_leaves(Problem(workload("memory_scan")).arguments)
    )
    state = [x.requires_grad_(x.is_floating_point()) for x in eager_scan.as_state(tensors)]
    outputs = eager_scan_gradients.ScanChunked.apply(*state, decay_power, eps, proxy_eps)
    grads = torch.autograd.grad(outputs, [x for x in state if x.requires_grad], [torch.empty_like(x) for x in outputs])
    assert {x.device.type for x in grads} == {"meta"}
    assert eager_scan_gradients.sort_plan(tensors[0], tensors[2], tensors[5]).order.device.type == "meta"
