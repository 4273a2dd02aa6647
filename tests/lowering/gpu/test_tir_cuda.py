"""TIR's kernels for GPUs as CUDA C and as binaries: barriers, memory, registers, refusals.

Between phases the CUDA C has the barriers that the template asks for, and none that it does not; ``test_tir_gpu`` rules
out races within a phase.
"""

from __future__ import annotations

import importlib.metadata
import importlib.util
import json
import re
from functools import cache
from typing import Any

import pytest
import torch

from schedules.base import Schedule
from schedules.gpu.address import AddressDecode, AddressDecodeBackward
from schedules.gpu.shared import FORWARD, RECOMPUTE, REVERSE, STRAIGHT, SharedScan, SharedScanBackward
from schedules.gpu.step import DecodeHeads, MemoryStep
from schedules.workload import Op, Workload
from tests.lowering.gpu.of_340m import workload

pytest.importorskip("tvm", reason="TIR's kernels need tvm: pip install 'ramnet[tvm]'")

from lowering import nvcc
from lowering.cache import COMPILERS
from lowering.fingerprint import package_versions, versions
from lowering.gpu import threads as threads_module
from lowering.gpu import tir
from lowering.gpu.cuda import generate as cuda
from lowering.gpu.cuda import ptxas
from lowering.gpu.cuda.driver import Cubin
from lowering.gpu.kernels import plan
from lowering.gpu.offline import arguments, compile_for, why_unsupported
from lowering.gpu.resources import Resources
from lowering.gpu.tir import Kernels
from lowering.targets import gpu_of

# One of each architecture, A100, A10, L4, H100, B200.
TARGETS = ("a100", "a10", "l4", "h100", "b200")
SCAN, BACKWARD = SharedScan(slot_lanes=8), SharedScanBackward(slot_lanes=8)
DEFAULTS: dict[Op, Schedule] = {
    "memory_scan": SCAN,
    "memory_scan_backward": BACKWARD,
    "memory_step": MemoryStep(compiler="tir"),
    "decode_heads": DecodeHeads(compiler="tir"),
    "address_decode": AddressDecode(compiler="tir"),
    "address_decode_backward": AddressDecodeBackward(compiler="tir"),
}
needs_nvcc = pytest.mark.skipif(nvcc.nvcc() is None, reason="no nvcc: pip install nvidia-cuda-nvcc nvidia-cuda-cccl")


def kernels(work: Workload, schedule: Schedule) -> Kernels:
    """Return the kernels that the op's plan launches."""
    launch: Any = plan(work.op, schedule, *arguments(work)).launches[0]
    return launch.kernels  # type: ignore[no-any-return]


@cache
def usual(op: Op) -> Kernels:
    """Return the kernels of an op of the 340m model under its schedule in ``DEFAULTS``."""
    return kernels(workload(op), DEFAULTS[op])


def source_for(op: Op, target: str) -> cuda.Source:
    return usual(op).source(gpu_of(target))


def text_of(work: Workload, schedule: Schedule) -> str:
    """Return the CUDA C for an H100."""
    return kernels(work, schedule).source(gpu_of("h100")).text


def body_of(text: str, name: str) -> str:
    """Return a kernel's body from CUDA C."""
    return text.split(f" {name}_kernel(")[-1]


def barriers(text: str) -> list[tuple[str, int]]:
    """Return each barrier in CUDA C in order, with the number of loops around it."""
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


# Barriers of the loads and stores of state and mass; around the first chunk's operands; around a later chunk's; and
# after each of the two phases of the unrolled tokens.
FILL, FIRST, NEXT, TOKENS = [(WARPS, 1)] * 4, [(WARPS, 0)] * 2, [(WARPS, 1)] * 2, [WARPS] * 2 * STRAIGHT


@pytest.mark.parametrize(("chunk", "loops"), [(8, 1), (32, 2)])
def test_a_scan_has_its_barriers(chunk: int, loops: int) -> None:
    schedule = SCAN.model_copy(update={"chunk": chunk})
    text = body_of(text_of(workload("memory_scan"), schedule), "memory_scan")
    assert barriers(text) == FILL + FIRST + [(kind, loops) for kind in TOKENS] + NEXT


def test_a_removed_barrier_is_detected(monkeypatch: pytest.MonkeyPatch) -> None:
    work = workload("memory_scan", M=256)
    found = len(barriers(text_of(work, SCAN)))
    real, calls = threads_module.Threads.barrier, []

    def all_but_one(self: Any) -> None:
        calls.append(self)
        if len(calls) != 5:
            real(self)

    monkeypatch.setattr(threads_module.Threads, "barrier", all_but_one)
    assert len(barriers(text_of(work, SCAN))) == found - 1, "TVM has added a barrier"


def test_the_barriers_of_steps_and_of_the_backward() -> None:
    step = body_of(source_for("memory_step", "h100").text, "memory_step")
    assert barriers(step) == [(WHOLE, 0), (WHOLE, 0)]
    heads = body_of(source_for("decode_heads", "h100").text, "decode_heads")
    assert barriers(heads) == [(WHOLE, 0)] * 5  # after logits, addresses and their shift by CAPE, and those of the step
    text = source_for("memory_scan_backward", "h100").text
    kernels_of = {part.split("_kernel(")[0].split()[-1]: part for part in text.split('extern "C" __global__')[1:]}
    each = {name: barriers(part) for name, part in kernels_of.items() if "{" in part}
    assert each["reads"] == each["writes"] == []
    # One copy of the loop with the mass and one without.
    assert each["recompute"] == each["reverse"] == FILL + 2 * (FIRST + [(kind, 2) for kind in TOKENS] + NEXT)


def test_prefetches_stay_between_their_barriers() -> None:
    scan, step = (source_for(op, "h100").text for op in ("memory_scan", "memory_step"))
    assert "__restrict__" in step and "__restrict__" not in scan


def test_shared_memory_is_what_the_schedules_compute() -> None:
    for op, schedule, expected in (
        ("memory_scan", SCAN, {"memory_scan": FORWARD}),
        ("memory_scan_backward", BACKWARD, {"recompute": RECOMPUTE, "reverse": REVERSE, "reads": None, "writes": None}),
    ):
        work = workload(op)  # type: ignore[arg-type]
        for name, found in source_for(op, "h100").shared.items():  # type: ignore[arg-type]
            needed = schedule.shared_bytes(work, expected[name]) if expected[name] else 0
            assert needed <= found <= needed + 15 * 64, name


def test_a_state_that_does_not_fit_is_refused_with_the_bytes_and_the_limit() -> None:
    wide = SharedScan(slot_lanes=4)
    with pytest.raises(ValueError, match=r"memory_scan on sm_86: a program needs 139264 bytes .* limit is 101376"):
        kernels(workload("memory_scan"), wide).source(gpu_of("a10"))
    assert "a program needs" in str(wide.refusal(workload("memory_scan", M=4096)))
    assert "limit is 232448" in str(BACKWARD.refusal(workload("memory_scan_backward", M=4096)))


@pytest.mark.parametrize(
    ("schedule", "work", "reason"),
    [
        (SCAN.model_copy(update={"slot_lanes": 3}), workload("memory_scan"), "slot_lanes is 3; it must be a power"),
        (SCAN.model_copy(update={"slot_lanes": 4}), workload("memory_scan", K=6), "that divides K = 6"),
        (SCAN.model_copy(update={"channels": 3}), workload("memory_scan"), "channels is 3; it must be 1, 2 or 4"),
        (SCAN, workload("memory_scan", "float64"), "be at most 16 bytes of sums"),
        (SCAN, workload("memory_scan", D=37), "divide D = 37"),
        (SCAN.model_copy(update={"chunk": 0}), workload("memory_scan"), "chunk is 0; it must be 1 or more"),
        (SCAN.model_copy(update={"chunk": 256}), workload("memory_scan", M=16), "would hold 384 of its operands"),
        (SCAN, workload("memory_scan", N=65536), "a launch has 65536 heads; form shared supports at most 65535"),
        (BACKWARD.model_copy(update={"heads": -1}), workload("memory_scan_backward"), "heads is -1; it must be 0"),
    ],
)  # fmt: skip
def test_schedules_that_cannot_be_built_are_refused(schedule: Schedule, work: Workload, reason: str) -> None:
    with pytest.raises(ValueError, match=reason):
        kernels(work, schedule)


@pytest.mark.parametrize("target", TARGETS)
def test_cuda_c_of_every_op_for_every_architecture(target: str) -> None:
    for op, schedule in DEFAULTS.items():
        source = source_for(op, target)
        for launch in plan(op, schedule, *arguments(workload(op))).launches:
            named = {f"{name}_ptr" for name, _ in source.arguments[launch.name]}
            sizes = {axis for _, shape in source.arguments[launch.name] for axis in shape if isinstance(axis, str)}
            parameters = source.parameters(launch.name)
            assert set(parameters) <= named | sizes
            function = {"arguments": source.arguments[launch.name], "parameters": parameters}
            # ``bind`` raises if shapes do not match the template.
            assert len(Cubin(b"", {launch.name: function}).bind(launch.name, launch.tensors)) == len(parameters)
            assert f"__launch_bounds__({launch.threads}) {launch.name}_kernel" in source.text


@needs_nvcc
@pytest.mark.parametrize("target", ["a100", "h100", "b200"])
def test_binaries_have_no_spills(target: str) -> None:
    # sm_86 (A10) and sm_89 (L4) differ from sm_80 (A100) only in the limits of threads and shared memory.
    limits = [gpu_of(other).shared_block for other in (("a100", "a10", "l4") if target == "a100" else (target,))]
    for op in DEFAULTS:
        source = source_for(op, target)
        _, printed = nvcc.compile_cuda(source.text, gpu_of(target).arch)
        found = ptxas.resources(printed, source.shared)
        assert set(found) == {launch.name for launch in plan(op, DEFAULTS[op], *arguments(workload(op))).launches}
        for name, resources in found.items():
            assert resources.spilled == 0 and resources.local == 0, (name, resources)
            assert 0 < resources.registers <= 255, name
            assert resources.shared <= min(limits)


@needs_nvcc
def test_a_launch_is_compiled_with_its_work() -> None:
    quick = {"chunk": 1}  # few unrolled tokens
    (scan,) = compile_for(workload("memory_scan"), "a100", SCAN.model_copy(update=quick))
    assert (scan.name, scan.work.programs) == ("memory_scan", 256 * 4)
    # A thread has 4 channels of one slot, with a product and two multiply-adds each, besides loads and stores.
    assert 12 < scan.instructions / workload("memory_scan").shape["T"] < 20 * 12
    backward = BACKWARD.model_copy(update={"heads": 100, **quick})
    launches = compile_for(workload("memory_scan_backward"), "a100", backward)
    assert [launch.name for launch in launches] == ["recompute", "reads", "reverse", "writes"] * 3
    sums = 4096 * 8 // 256  # programs per head that sum the parts of T · K dot products
    assert [launch.work.programs for launch in launches] == [400, 100 * sums] * 4 + [224, 56 * sums] * 2
    assert all(launch.resources.registers > 0 for launch in (scan, *launches))


@needs_nvcc
def test_a_binary_is_cached_with_what_a_launch_needs(tmp_path: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RAMNET_CACHE", str(tmp_path))
    work, schedule = workload("memory_step"), MemoryStep(compiler="tir")
    first, compiled_now = kernels(work, schedule).from_disk(gpu_of("a100"))
    again, compiled_again = kernels(work, schedule).from_disk(gpu_of("a100"))
    assert (compiled_now, compiled_again) == (True, False)
    assert again.cubin == first.cubin and again.functions == first.functions
    tensors = [torch.empty(3, 8, dtype=torch.int32), torch.empty(3, 8), *[torch.empty(3, 8)] * 2, torch.empty(3, 64)]
    tensors += [torch.empty(3, 1024, 64), torch.empty(3, 1024), torch.empty(3, 64)]
    values = again.bind("memory_step", tensors)
    assert {x for x, is_address in values if is_address} == {x.data_ptr() for x in tensors}
    with pytest.raises(ValueError, match=r"memory_step: O is \[2, 64\]; it must be"):
        again.bind("memory_step", [*tensors[:-1], torch.empty(2, 64)])


def test_binaries_of_another_machine_are_used_without_the_compilers(
    tmp_path: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("RAMNET_CACHE", str(tmp_path))
    printed = "Compiling entry function 'memory_step_kernel' for 'sm_90'\nUsed 32 registers, 16 bytes smem"
    monkeypatch.setattr(tir, "_compile_cuda", lambda text, arch: (b"cubin", printed))
    work, there, not_there = workload("memory_step"), MemoryStep(compiler="tir"), MemoryStep(compiler="tir", threads=32)
    made, _ = kernels(work, there).from_disk(gpu_of("h100"))
    used = versions("h100", there)
    (tmp_path / "kernels" / COMPILERS).write_text(json.dumps(used))

    def no_version(name: str) -> str:
        raise importlib.metadata.PackageNotFoundError(name)

    package_versions.cache_clear()
    monkeypatch.setattr(importlib.metadata, "version", no_version)
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    monkeypatch.setattr(nvcc, "nvcc", lambda: None)
    try:
        assert "apache-tvm" in used and versions("h100", there) == used
        assert why_unsupported(there, "h200", work) is None
        assert "TIR's kernels need TVM" in str(why_unsupported(not_there, "h200", work))
        found, compiled_now = kernels(work, there).from_disk(gpu_of("h200"))
    finally:
        package_versions.cache_clear()
    assert (found.cubin, compiled_now) == (b"cubin", False)
    assert found.functions == made.functions
    assert Resources(**found.functions["memory_step"]["resources"]).registers == 32


def test_compiling_needs_nvcc(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(nvcc, "nvcc", lambda: None)
    with pytest.raises(nvcc.NoNvccError, match="pip install nvidia-cuda-nvcc"):
        plan("memory_step", MemoryStep(compiler="tir"), *arguments(workload("memory_step"))).compile(gpu_of("h100"))
