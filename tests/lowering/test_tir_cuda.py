"""TIR's kernels for GPUs as CUDA C and as binaries: barriers where they must be, memory, registers, refusals.

Between phases the CUDA C has the barriers that the template asks for, and none that it does not; ``test_tir_gpu`` rules
out races within a phase.
"""

from __future__ import annotations

import re
from functools import cache
from typing import Any

import pytest
import torch

from schedules.base import Schedule
from schedules.gpu.address import AddressDecode, AddressDecodeBackward
from schedules.gpu.scan import MemoryScan, MemoryScanBackward
from schedules.gpu.shared import backward_bytes, forward_bytes
from schedules.gpu.step import DecodeHeads, MemoryStep
from schedules.workload import Op, Workload
from tests.lowering.of_340m import workload

pytest.importorskip("tvm", reason="TIR's kernels need tvm: pip install 'ramnet[tvm]'")

from lowering import cuda, gpu_tir, nvcc
from lowering.targets import gpu_of
from lowering.tir import threads as threads_module
from lowering.tir.programs import programs

# One of each architecture, A100, A10, L4, H100, B200.
TARGETS = ("a100", "a10", "l4", "h100", "b200")
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


def text_of(work: Workload, schedule: Schedule) -> str:
    """CUDA C for an H100."""
    return cuda.generate(work, gpu_of("h100"), schedule).text


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
    text = body_of(text_of(workload("memory_scan", M=256), schedule), "memory_scan")
    # Operands are there; the first chunk's mass, token by token, and its factors; two tokens; around a chunk's output.
    first = [(around, 0), (within, 1), (within, 1), (around, 0), (around, 0)]
    expected = [*first, *[(within, 2)] * 4, (around, 1), (around, 1)]
    assert barriers(text) == expected


def test_a_check_of_barriers_sees_that_one_is_gone(monkeypatch: pytest.MonkeyPatch) -> None:
    schedule, work = MemoryScan(form="shared", tile=16, slot_lanes=4, chunk=8), workload("memory_scan", M=256)
    assert len(barriers(text_of(work, schedule))) == 11
    real, calls = threads_module.Threads.barrier, []

    def all_but_one(self: Any, warp: bool = False) -> None:
        calls.append(warp)
        if len(calls) != 5:
            real(self, warp)

    monkeypatch.setattr(threads_module.Threads, "barrier", all_but_one)
    assert len(barriers(text_of(work, schedule))) == 10, "TVM put a barrier of its own"


def test_what_steps_and_a_backward_synchronise() -> None:
    step = body_of(text_of(workload("memory_step"), MemoryStep(compiler="tir")), "memory_step")
    assert barriers(step) == [(WHOLE, 0), (WHOLE, 0)]
    heads = body_of(text_of(workload("decode_heads"), DecodeHeads(compiler="tir")), "decode_heads")
    assert barriers(heads) == [(WHOLE, 0)] * 4  # logits, addresses, and the step's
    text = text_of(workload("memory_scan_backward"), DEFAULTS["memory_scan_backward"])
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
