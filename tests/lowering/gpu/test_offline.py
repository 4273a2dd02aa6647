"""Workloads are planned, counted and compiled without a GPU."""

from __future__ import annotations

import pytest
import torch

from lowering import nvcc
from lowering.gpu.kernels import plan
from lowering.gpu.offline import NoCompilerError, arguments, compile_for, too_large
from lowering.targets import gpu_of
from ramnet.config import RamNetConfig
from schedules.base import Schedule
from schedules.gpu import SCHEDULES, AddressDecode, MemoryStep
from schedules.gpu.shared import SharedScan
from schedules.of_model import of_model_on_gpu

CONFIG = RamNetConfig.preset("340m")
WORKLOADS = {workload.op: workload for workload in of_model_on_gpu(CONFIG, batch_size=2, length=8, decode_batch=4)}


def test_a_model_trains_and_decodes_with_six_ops_in_bfloat16() -> None:
    assert set(WORKLOADS) == set(SCHEDULES)
    assert {workload.dtype for workload in WORKLOADS.values()} == {"bfloat16"}
    assert WORKLOADS["address_decode"].shape["R"] == 2 * 2 * 16 * 8
    assert WORKLOADS["memory_scan"].shape["N"] == 2 * 16
    assert WORKLOADS["decode_heads"].shape["N"] == WORKLOADS["memory_step"].shape["N"] == 4 * 16


@pytest.mark.parametrize("size", ["batch_size", "length", "decode_batch"])
def test_a_size_below_one_is_refused(size: str) -> None:
    with pytest.raises(ValueError, match=f"{size} is 0; it must be at least 1"):
        of_model_on_gpu(CONFIG, **{size: 0})


# The indices of the state's tensors, or their gradients, among each op's tensors.
STATES = {
    "address_decode": 0, "address_decode_backward": 0, "memory_scan": 2, "memory_scan_backward": 4, "memory_step": 2,
    "decode_heads": 2,
}  # fmt: skip


@pytest.mark.parametrize("op", SCHEDULES)
def test_arguments_are_meta_tensors_and_the_state_is_float32(op: str) -> None:
    tensors = [x for x in arguments(WORKLOADS[op]) if isinstance(x, torch.Tensor)]
    assert {x.device.type for x in tensors} == {"meta"}
    state = [x.dtype for x in tensors if CONFIG.layers[0].slots in x.shape]
    assert state == [torch.float32] * STATES[op]
    others = {x.dtype for x in tensors if x.is_floating_point() and CONFIG.layers[0].slots not in x.shape}
    assert others == {torch.bfloat16}


def every_schedule(op: str) -> list[Schedule]:
    """Return a schedule for each compiler or, for a scan, for each form."""
    kinds = SCHEDULES[op]
    if "" in kinds:
        return [kinds[""].model_validate({"compiler": compiler}) for compiler in ("triton", "tir")]
    knobs = {"shared": {"slot_lanes": 8, "chunk": 8}}
    return [kind.model_validate(knobs.get(form, {})) for form, kind in kinds.items()]


@pytest.mark.parametrize("op", SCHEDULES)
def test_plans_of_all_forms_have_the_same_outputs_and_are_counted_without_a_gpu(op: str) -> None:
    given = arguments(WORKLOADS[op])
    plans = [plan(op, schedule, *given) for schedule in every_schedule(op)]
    outputs = [[(x.shape, x.dtype, x.device.type) for x in made.outputs] for made in plans]
    assert all(found == outputs[0] for found in outputs)
    for made in plans:
        work = made.count()
        assert len(work) == len(made.launches) and all(each.programs > 0 < each.cache_bytes for each in work)


@pytest.mark.parametrize("op", ["address_decode", "address_decode_backward", "memory_step", "decode_heads"])
def test_both_compilers_are_counted_by_one_rule(op: str) -> None:
    triton, tir = (plan(op, schedule, *arguments(WORKLOADS[op])).count() for schedule in every_schedule(op))
    assert [(x.programs, x.dram_bytes) for x in triton] == [(x.programs, x.dram_bytes) for x in tir]


def test_the_compiler_of_a_schedule() -> None:
    assert MemoryStep().compiler == "triton"
    assert MemoryStep(compiler="tir").compiler == "tir"
    for op in ("memory_scan", "memory_scan_backward"):
        found = {form: kind().compiler for form, kind in SCHEDULES[op].items()}
        forward_only = {"serial": "triton"} if op == "memory_scan" else {}
        assert found == {"slots": "triton", "shared": "tir", **forward_only}


def test_a_target_without_a_gpu_is_refused() -> None:
    with pytest.raises(ValueError, match="target 'cpu' is not a GPU"):
        compile_for(WORKLOADS["memory_step"], "cpu", MemoryStep())


def test_an_invalid_schedule_is_refused() -> None:
    with pytest.raises(ValueError, match="memory_step: threads is 33"):
        compile_for(WORKLOADS["memory_step"], "a100", MemoryStep(threads=33))


def test_tir_does_not_compile_for_amd() -> None:
    with pytest.raises(NoCompilerError, match="tir does not compile for mi300x; use triton"):
        compile_for(WORKLOADS["address_decode"], "mi300x", AddressDecode(compiler="tir"))


def test_threads_must_be_a_multiple_of_the_warp() -> None:
    with pytest.raises(NoCompilerError, match="threads is 32; it must be a multiple of mi300x's warp of 64 threads"):
        compile_for(WORKLOADS["memory_step"], "mi300x", MemoryStep(threads=32))


def test_a_program_must_fit_into_the_gpus_shared_memory() -> None:
    large = WORKLOADS["memory_scan"].model_copy(update={"shape": {**WORKLOADS["memory_scan"].shape, "M": 2048}})
    schedule = SharedScan(channels=4, slot_lanes=8, chunk=8)
    assert too_large(schedule, large, gpu_of("h100")) is None
    assert "101376" in str(too_large(schedule, large, gpu_of("l4")))
    assert too_large(AddressDecode(), WORKLOADS["address_decode"], gpu_of("l4")) is None


def test_tir_needs_nvcc(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(nvcc, "nvcc", lambda: None)
    with pytest.raises(NoCompilerError, match=r"nvcc, .* is not installed: pip install nvidia-cuda-nvcc"):
        compile_for(WORKLOADS["memory_step"], "a100", MemoryStep(compiler="tir"))


def test_a_process_that_interprets_kernels_cannot_compile_them(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    with pytest.raises(RuntimeError, match="TRITON_INTERPRET is set in this process"):
        compile_for(WORKLOADS["memory_step"], "a100", MemoryStep())
