"""The resources of compiled launches."""

from __future__ import annotations

import pytest
import torch

from lowering.gpu.cuda.ptxas import spilled_bytes
from lowering.gpu.resources import Resources
from lowering.gpu.triton_compiler import amd_resources, resource_usage
from lowering.targets import gpu_of
from tests.lowering.gpu.compiled import compile_plan

KERNELS, INPUTS = "tests.lowering.gpu.spilling", [torch.zeros(1 << 15)]

# The output of cuobjdump and ptxas of CUDA 13.
USAGE = """
Resource usage:
 Common:
  GLOBAL:0
 Function scan_rows:
  REG:96 STACK:0 SHARED:0 LOCAL:0 CONSTANT[0]:400 TEXTURE:0 SURFACE:0 SAMPLER:0
 Function state_kernel:
  REG:255 STACK:320 SHARED:1024 LOCAL:16 CONSTANT[0]:576 TEXTURE:0 SURFACE:0 SAMPLER:0
"""
PRINTED = """
ptxas info    : Function properties for fat
    3512 bytes stack frame, 7860 bytes spill stores, 7804 bytes spill loads
"""
AMD = """
    .group_segment_fixed_size: 2048
    .private_segment_fixed_size: 40
    .vgpr_count:     67
    .vgpr_spill_count: 9
"""


def test_cuobjdump_is_read_by_function() -> None:
    found = resource_usage(USAGE)
    assert set(found) == {"scan_rows", "state_kernel"}
    assert (found["scan_rows"]["REG"], found["scan_rows"]["STACK"]) == (96, 0)
    assert (found["state_kernel"]["LOCAL"], found["state_kernel"]["SHARED"]) == (16, 1024)


def test_spills_are_those_that_ptxas_prints_not_the_stack() -> None:
    assert spilled_bytes(PRINTED) == 7860
    assert spilled_bytes(PRINTED.replace("7860", "0").replace("7804", "0")) == 0


def test_amd_counts_spilled_registers_of_four_bytes() -> None:
    assert amd_resources(AMD) == Resources(registers=67, spilled=36, local=40, shared=2048)
    with pytest.raises(ValueError, match="has no vgpr_count"):
        amd_resources(AMD.replace("vgpr_count", "count"))


@pytest.mark.parametrize(("arch", "text"), [("sm_80", "ptx"), ("sm_100", "ptx"), ("gfx942", "amdgcn")])
def test_launches_are_compiled_without_a_gpu(arch: str, text: str) -> None:
    (found,) = compile_plan(KERNELS, INPUTS, 64, arch)
    assert found.name == "add"
    assert "add" in found.asm[text]
    assert found.resources.spilled == found.resources.local == 0
    assert 0 < found.resources.registers < 64


def test_values_beyond_the_registers_are_spilled() -> None:
    (found,) = compile_plan(KERNELS, INPUTS, 64, "sm_80", plan="plan_large")
    assert found.resources.local > 0
    assert found.resources.spilled >= 4 * (272 - 255)
    (found,) = compile_plan(KERNELS, INPUTS, 64, "gfx942", plan="plan_large")
    assert found.resources.registers > 255
    assert found.resources.spilled == 0


def test_a_program_smaller_than_a_warp_is_refused() -> None:
    with pytest.raises(ValueError, match="add has programs of 32 threads; gfx942 needs a multiple of 64"):
        compile_plan(KERNELS, INPUTS, 32, "gfx942")


@pytest.mark.skipif(torch.cuda.is_available(), reason="kernels are not interpreted where there is a GPU")
def test_an_interpreted_kernel_cannot_be_compiled() -> None:
    from tests.lowering.gpu.spilling import plan

    launch = plan(torch.empty(1 << 15, device="meta"), 64).launches[0]
    with pytest.raises(RuntimeError, match="add is interpreted, and cannot be compiled"):
        launch.compile(gpu_of("a100"))
