"""TIR's kernels for GPUs: their templates run on the CPU, and their CUDA C compiles, with barriers where they must be.

Numbers are checked where the templates run as loops over programs and threads. Races are ruled out in two steps: the
loops over threads give the same bits in either order, so that no thread needs what another one does in the same phase;
and between phases the CUDA C has the barriers that the template asks for, and none that it does not.
"""

from __future__ import annotations

import re
from functools import cache
from typing import Any

import pytest
import torch
from torch import Tensor

from ramnet.ops import reference
from schedules.base import Schedule
from schedules.gpu.address import AddressDecode, AddressDecodeBackward
from schedules.gpu.scan import MemoryScan, MemoryScanBackward
from schedules.gpu.shared import backward_bytes, forward_bytes
from schedules.gpu.step import DecodeHeads, MemoryStep
from schedules.workload import AXES, Op, Workload
from tests import brute_force
from tests.samples import DIFFERENTIABLE, TOLERANCE, cotangents, relative_rmse, scan_inputs, step_inputs

pytest.importorskip("tvm", reason="TIR's kernels need tvm: pip install 'ramnet[tvm]'")

from lowering import cuda, gpu_tir, nvcc
from lowering.gpu import GpuKernels
from lowering.targets import gpu_of
from lowering.tir import threads as threads_module
from lowering.tir.programs import programs

# One of each architecture, A100, A10, L4, H100, B200.
TARGETS = ("a100", "a10", "l4", "h100", "b200")
OF_340M = {"N": 256, "T": 4096, "K": 8, "M": 1024, "D": 64, "U": 5, "P": 4, "R": 2**21}
SCAN, BACK = MemoryScan(form="shared", tile=8, slot_lanes=4), MemoryScanBackward(form="shared", tile=8, slot_lanes=4)
DEFAULTS: dict[Op, Schedule] = {
    "memory_scan": SCAN,
    "memory_scan_backward": BACK.model_copy(update={"chunk": 8}),
    "memory_step": MemoryStep(compiler="tir"),
    "decode_heads": DecodeHeads(compiler="tir"),
    "address_decode": AddressDecode(compiler="tir"),
    "address_decode_backward": AddressDecodeBackward(compiler="tir"),
}
needs_nvcc = pytest.mark.skipif(nvcc.nvcc() is None, reason="no nvcc: pip install nvidia-cuda-nvcc nvidia-cuda-cccl")


def workload(op: Op, dtype: str = "bfloat16", **sizes: int) -> Workload:
    constants = {"decay_power": 1.0, "eps": 1e-6, "proxy_eps": 0.01}
    if op.startswith("address"):
        constants = {}
    elif not op.endswith("backward"):
        del constants["proxy_eps"]
    shape = {axis: {**OF_340M, **sizes}[axis] for axis in AXES[op]}
    return Workload(op=op, shape=shape, dtype=dtype, constants=constants)  # type: ignore[arg-type]


def kernels(**given: Schedule) -> GpuKernels:
    return GpuKernels("h100", given=given)


@pytest.fixture(autouse=True)
def poisoned() -> Any:
    """Every torch.empty is filled with NaN."""
    torch.use_deterministic_algorithms(True)
    yield
    torch.use_deterministic_algorithms(False)


SHAPES = [
    # T, K, M, D, γ, access, type, then tile, slot_lanes, chunk, checkpoint
    (7, 5, 24, 24, 0.5, "hot", torch.float32, 8, 1, 4, 4),
    (63, 6, 50, 48, 2.3, "saturated", torch.float32, 16, 3, 8, 16),
    (63, 6, 50, 48, 1.0, "saturated", torch.bfloat16, 32, 1, 8, 64),
    (1, 3, 9, 5, 0.0, "uniform", torch.float32, 8, 3, 2, 2),
    (7, 4, 16, 24, 1.0, "hot", torch.float64, 16, 2, 2, 4),
]


@pytest.mark.parametrize(
    ("T", "K", "M", "D", "gamma", "access", "dtype", "tile", "lanes", "chunk", "checkpoint"), SHAPES
)
def test_scans_follow_the_paper(T, K, M, D, gamma, access, dtype, tile, lanes, chunk, checkpoint) -> None:
    state = torch.float64 if dtype == torch.float64 else torch.float32
    tensors = scan_inputs(1, 2, T, K, M, D, dtype=dtype, state_dtype=state, access=access, seed=1)
    knobs = {"form": "shared", "tile": tile, "slot_lanes": lanes, "chunk": chunk}
    ops = kernels(
        memory_scan=MemoryScan(**knobs), memory_scan_backward=MemoryScanBackward(**knobs, checkpoint=checkpoint)
    )
    expected = brute_force.memory_scan(**tensors, decay_power=gamma, eps=1e-6)
    for got, want in zip(ops.memory_scan(*tensors.values(), gamma, 1e-6, 0.01), expected, strict=True):
        assert relative_rmse(got, want) < TOLERANCE[got.dtype]

    grads = cotangents(tensors)
    gradients = brute_force.memory_scan_gradients(grads, tensors, gamma, 1e-6, 0.01)
    found = ops.memory_scan_backward(*grads, *tensors.values(), gamma, 1e-6, 0.01)
    for name, got, want in zip(DIFFERENTIABLE, found, gradients, strict=True):
        assert relative_rmse(got, want) < TOLERANCE[got.dtype], name


@pytest.mark.parametrize(
    ("R", "U", "P", "K", "dtype", "unroll"),
    [(37, 3, 3, 4, torch.float32, 1), (70, 5, 4, 8, torch.bfloat16, 0), (1, 2, 5, 7, torch.float64, 2)],
)
def test_addresses_and_their_gradients(R, U, P, K, dtype, unroll) -> None:
    logits = torch.randn(R, U, P, generator=torch.Generator().manual_seed(3)).to(dtype)
    ops = kernels(
        address_decode=AddressDecode(compiler="tir", threads=32, unroll=unroll),
        address_decode_backward=AddressDecodeBackward(compiler="tir", threads=32),
    )
    slots, weights = ops.address_decode(logits, K)
    expected_slots, expected = reference.address_decode(logits, K)
    assert relative_rmse(weights, expected) < TOLERANCE[dtype]
    if dtype != torch.bfloat16:  # whose logits tie
        assert torch.equal(slots, expected_slots)
    grads = torch.randn(R, K, generator=torch.Generator().manual_seed(4)).to(dtype)
    want = reference.address_decode_backward(
        grads.double(), logits.double(), expected_slots, reference.address_decode(logits.double(), K)[1]
    )
    got = ops.address_decode_backward(grads, logits, expected_slots, expected)
    assert relative_rmse(got, want) < 2 * TOLERANCE[dtype]


@pytest.mark.parametrize(("D", "gamma", "dtype"), [(24, 0.5, torch.float32), (37, 2.3, torch.bfloat16)])
def test_a_step_in_place(D, gamma, dtype) -> None:
    tensors = scan_inputs(2, 3, 1, 5, 24, D, dtype=dtype, state_dtype=torch.float32, access="saturated", seed=5)
    got, wanted = (step_inputs(tensors, 0) for _ in range(2))
    wanted = {n: x.double() if x.is_floating_point() else x for n, x in wanted.items()}
    output = kernels(memory_step=MemoryStep(compiler="tir", threads=32)).memory_step(*got.values(), gamma, 1e-6)
    assert relative_rmse(output, reference.memory_step(*wanted.values(), gamma, 1e-6)) < TOLERANCE[dtype]
    for name in ("memory", "mass"):
        assert relative_rmse(got[name], wanted[name]) < TOLERANCE[torch.float32]


@pytest.mark.parametrize(("cape_heads", "position", "unroll"), [(0, 0, 0), (1, 5, 1), (3, 2**40 + 3, 1)])
def test_a_layers_token_in_one_launch(cape_heads: int, position: int, unroll: int) -> None:
    B, H, U, P, K, D = 2, 3, 3, 3, 5, 24
    generator = torch.Generator().manual_seed(9)
    projected = 2 * torch.randn(B, 2 * H * U * P + H * D, generator=generator)
    log_scale = 0.3 * torch.randn(2, H, generator=generator)
    memory, mass = torch.randn(B, H, P**U, D, generator=generator), 0.1 + torch.rand(B, H, P**U, generator=generator)

    logits, values = projected.double().split([2 * H * U * P, H * D], dim=1)
    scale = log_scale.double().exp() / 0.7
    address = brute_force.keep_largest(
        brute_force.product_softmax(logits.view(B, 2, H, U, P) * scale[..., None, None]), K
    )
    with_cape = (torch.arange(H) < cape_heads)[:, None]
    address = torch.where(with_cape, address.roll(-(position % P**U), dims=-1), address)
    read, write = address.unsqueeze(-2).unbind(1)
    states = brute_force.pdma(write, read, values.view(B, H, 1, D), memory.double(), mass.double(), 1.3, 1e-4, 0.01)

    ops = kernels(decode_heads=DecodeHeads(compiler="tir", threads=32, unroll=unroll))
    at = torch.tensor(position)
    output = ops.decode_heads(projected, log_scale, at, memory, mass, U, P, K, cape_heads, 0.7, 1.3, 1e-4)
    for got, want in zip((output, memory, mass), states, strict=True):
        assert relative_rmse(got, want.view(got.shape)) < TOLERANCE[torch.float32]


def both_ways(op: Op, schedule: Schedule, tensors: list[Tensor], outputs: list[Tensor]) -> list[list[Tensor]]:
    """An op's one function with its threads' loops forwards and backwards."""
    slots, dim = tensors[5].shape[1:]
    work = workload(op, "float32", K=tensors[0].shape[-1], M=slots, D=dim)
    results = []
    for backwards in (False, True):
        mine = [x.clone() for x in (*tensors, *outputs)]
        gpu_tir.on_cpu(work, schedule, backwards=backwards)(op, *mine)
        results.append(mine)
    return results


def test_no_thread_of_a_phase_needs_another() -> None:
    tensors = [x.flatten(0, 1) for x in scan_inputs(1, 2, 19, 6, 20, 24, access="hot", seed=6).values()]
    schedule = MemoryScan(form="shared", tile=8, slot_lanes=3, chunk=4)
    forwards, backwards = both_ways("memory_scan", schedule, tensors, [torch.zeros_like(x) for x in tensors[4:]])
    assert all(torch.equal(x, y) for x, y in zip(forwards, backwards, strict=True))
    step = [x.flatten(0, 1) for x in step_inputs(scan_inputs(1, 2, 1, 6, 20, 24, seed=7), 0).values()]
    forwards, backwards = both_ways(
        "memory_step", MemoryStep(compiler="tir", threads=32), step, [torch.zeros_like(step[4])]
    )
    assert all(torch.equal(x, y) for x, y in zip(forwards, backwards, strict=True))


def test_no_thread_of_a_backward_phase_needs_another(monkeypatch: pytest.MonkeyPatch) -> None:
    tensors = scan_inputs(1, 1, 19, 6, 20, 24, access="hot", seed=8)
    grads = [torch.ones_like(tensors[name]) for name in ("values", "memory", "mass")]
    ops = kernels(memory_scan_backward=MemoryScanBackward(form="shared", tile=8, slot_lanes=2, chunk=4, checkpoint=8))
    found = []
    on_cpu = gpu_tir.on_cpu
    for backwards in (False, True):
        monkeypatch.setattr(gpu_tir, "_ready", {})
        monkeypatch.setattr(gpu_tir, "on_cpu", lambda *a, way=backwards: on_cpu(*a, way))
        found.append(ops.memory_scan_backward(*grads, *tensors.values(), 0.5, 1e-6, 0.01))
    assert all(torch.equal(x, y) for x, y in zip(*found, strict=True))


def body_of(text: str, name: str) -> str:
    """A kernel's body in CUDA C."""
    return text.split(f" {name}_kernel(")[-1]


def barriers(text: str) -> list[tuple[str, int]]:
    """Each barrier in CUDA C in order, with how many loops it stands in."""
    found, loops, depth = [], [], 0
    for line in text.splitlines():
        if re.match(r"\s*for \(", line):
            loops.append(depth)
        depth += line.count("{") - line.count("}")
        while loops and depth <= loops[-1]:
            loops.pop()
        match = re.search(r"__sync(warp|threads)\(\)", line)
        if match:
            found.append((match[1], len(loops)))
    return found


WARPS, WHOLE = "warp", "threads"


@pytest.mark.parametrize(
    ("schedule", "within", "around"),
    [
        (MemoryScan(form="shared", tile=8, slot_lanes=4), WARPS, WARPS),  # a program is a warp
        (MemoryScan(form="shared", tile=64, chunk=8), WARPS, WHOLE),  # rows are a thread's own, the mass a warp's
        (MemoryScan(form="shared", tile=16, slot_lanes=4, chunk=8), WHOLE, WHOLE),
    ],
)
def test_a_scan_has_its_barriers(schedule: MemoryScan, within: str, around: str) -> None:
    text = body_of(cuda.cuda_source(workload("memory_scan", M=256), "h100", schedule), "memory_scan")
    # Operands are there; the first chunk's mass, token by token, and its factors; two tokens; around a chunk's output.
    first = [(around, 0), (within, 1), (within, 1), (around, 0), (around, 0)]
    expected = [*first, *[(within, 2)] * 4, (around, 1), (around, 1)]
    assert barriers(text) == expected


def test_a_check_of_barriers_sees_that_one_is_gone(monkeypatch: pytest.MonkeyPatch) -> None:
    schedule, work = MemoryScan(form="shared", tile=16, slot_lanes=4, chunk=8), workload("memory_scan", M=256)
    assert len(barriers(cuda.cuda_source(work, "h100", schedule))) == 11
    real, calls = threads_module.Threads.barrier, []

    def all_but_one(self: Any, warp: bool = False) -> None:
        calls.append(warp)
        if len(calls) != 5:
            real(self, warp)

    monkeypatch.setattr(threads_module.Threads, "barrier", all_but_one)
    assert len(barriers(cuda.cuda_source(work, "h100", schedule))) == 10, "TVM put a barrier of its own"


def test_what_steps_and_a_backward_synchronise() -> None:
    step = body_of(cuda.cuda_source(workload("memory_step"), "h100", MemoryStep(compiler="tir")), "memory_step")
    assert barriers(step) == [(WHOLE, 0), (WHOLE, 0)]
    heads = body_of(cuda.cuda_source(workload("decode_heads"), "h100", DecodeHeads(compiler="tir")), "decode_heads")
    assert barriers(heads) == [(WHOLE, 0)] * 4  # logits, addresses, and the step's
    text = cuda.cuda_source(workload("memory_scan_backward"), "h100", DEFAULTS["memory_scan_backward"])
    kernels_of = {part.split("_kernel(")[0].split()[-1]: part for part in text.split('extern "C" __global__')[1:]}
    each = {name: barriers(part) for name, part in kernels_of.items() if "{" in part}
    assert each["mass"] == [(WARPS, 1), (WARPS, 2), (WARPS, 2)]
    assert each["weights"] == [(WARPS, 1), (WARPS, 2), (WARPS, 2), (WARPS, 0)]
    # Copies; tokens forward; the same in each segment, then back, with the products summed after each chunk.
    forward = [(WARPS, 2), (WARPS, 3), (WARPS, 2)]
    back = [(WARPS, 2), (WARPS, 3), (WARPS, 3), (WARPS, 2), (WARPS, 2)]
    copy = [(WARPS, 1), (WARPS, 1)]
    assert each["state"] == [(WARPS, 0), (WARPS, 0), *forward, *copy, *copy, *forward, *back]


def test_shared_memory_is_what_the_schedules_say() -> None:
    for op, schedule, expected in (
        ("memory_scan", SCAN, forward_bytes(workload("memory_scan"), SCAN)),
        ("memory_scan_backward", BACK, backward_bytes(workload("memory_scan_backward"), BACK)),
    ):
        source = cuda.generate(workload(op), gpu_of("h100"), schedule)  # type: ignore[arg-type]
        assert expected <= max(source.shared.values()) <= expected + 15 * 64


def test_a_state_that_does_not_fit_is_refused_with_the_bytes_and_the_limit() -> None:
    wide = MemoryScan(form="shared", tile=32, chunk=16)
    with pytest.raises(ValueError, match=r"memory_scan on sm_86: a program needs 146944 bytes .* limit is 101376"):
        cuda.generate(workload("memory_scan"), gpu_of("a10"), wide)
    assert "a program needs" in str(wide.refusal(workload("memory_scan", M=4096)))
    assert "limit is 232448" in str(BACK.refusal(workload("memory_scan_backward", M=4096)))


@pytest.mark.parametrize(
    ("schedule", "work", "reason"),
    [
        (MemoryScan(form="shared", tile=8, slot_lanes=3), workload("memory_scan"), "slot_lanes is 3, which does not"),
        (MemoryScan(form="shared", tile=8, chunk=3), workload("memory_scan"), "chunk is 3; it must be a positive"),
        (MemoryScan(form="shared", tile=1, chunk=64), workload("memory_scan"), "would hold 2112 operands"),
        (BACK.model_copy(update={"checkpoint": 100}), workload("memory_scan_backward"), "checkpoint is 100; it must"),
    ],
)  # fmt: skip
def test_schedules_that_cannot_be_built_are_refused(schedule: Schedule, work: Workload, reason: str) -> None:
    with pytest.raises(ValueError, match=reason):
        cuda.generate(work, gpu_of("h100"), schedule)


@cache
def source_for(op: Op, target: str) -> cuda.Source:
    return cuda.generate(workload(op), gpu_of(target), DEFAULTS[op])


@pytest.mark.parametrize("target", TARGETS)
def test_cuda_c_of_every_op_for_every_architecture(target: str) -> None:
    for op, schedule in DEFAULTS.items():
        source = source_for(op, target)
        for program in programs(workload(op), schedule):
            named = {f"{name}_ptr" for name, _ in source.arguments[program.name]}
            sizes = {axis for _, shape in source.arguments[program.name] for axis in shape if isinstance(axis, str)}
            assert set(source.parameters(program.name)) <= named | sizes
            assert {x[0] for x in program.grid if isinstance(x, tuple)} <= sizes
            assert f"__launch_bounds__({program.threads}) {program.name}_kernel" in source.text


@needs_nvcc
@pytest.mark.parametrize("target", TARGETS)
def test_binaries_spill_nothing(target: str) -> None:
    # The sm_86 and sm_89 of A10 and L4 differ from A100's sm_80 in how many threads, and how much memory, they share.
    for op in DEFAULTS if target in ("a100", "h100", "b200") else ("memory_scan", "memory_scan_backward"):
        source = source_for(op, target)
        _, told = nvcc.compile_cuda(source.text, gpu_of(target).arch)
        found = nvcc.resources(told, source.shared)
        assert set(found) == {program.name for program in programs(workload(op), DEFAULTS[op])}
        for name, resources in found.items():
            assert resources.spilled == 0 and resources.local == 0, (name, resources)
            assert 0 < resources.registers <= 128, name
            assert resources.shared <= gpu_of(target).shared_block


@needs_nvcc
def test_a_launch_is_compiled_with_its_work() -> None:
    launches = cuda.compiled(workload("memory_scan_backward"), "a100", DEFAULTS["memory_scan_backward"])
    assert [launch.name for launch in launches] == ["mass", "state", "weights"]
    assert [launch.work.programs for launch in launches] == [256, 256 * 8, 256]
    assert all(launch.resources.registers > 0 for launch in launches)


@needs_nvcc
def test_a_binary_is_cached_with_what_a_launch_needs(tmp_path: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RAMNET_CACHE", str(tmp_path))
    work, schedule = workload("memory_step"), MemoryStep(compiler="tir")
    first, compiled_now = gpu_tir.binary(work, "a100", schedule)
    again, compiled_again = gpu_tir.binary(work, "a100", schedule)
    assert (compiled_now, compiled_again) == (True, False)
    assert again.cubin == first.cubin and again.functions == first.functions
    tensors = [torch.empty(3, 8, dtype=torch.int32), torch.empty(3, 8), *[torch.empty(3, 8)] * 2, torch.empty(3, 64)]
    tensors += [torch.empty(3, 1024, 64), torch.empty(3, 1024), torch.empty(3, 64)]
    values, grid = again.bind("memory_step", tensors)
    assert grid == (3,) and {x for x, is_address in values if is_address} == {x.data_ptr() for x in tensors}
    with pytest.raises(ValueError, match=r"memory_step: O is \[2, 64\]; it must be"):
        again.bind("memory_step", [*tensors[:-1], torch.empty(2, 64)])


def test_without_nvcc_there_is_no_binary_but_a_reason(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(nvcc, "nvcc", lambda: None)
    with pytest.raises(nvcc.NoNvccError, match="pip install nvidia-cuda-nvcc"):
        cuda.compiled(workload("memory_step"), "h100", MemoryStep(compiler="tir"))
