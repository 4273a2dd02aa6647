"""Instructions are counted in machine code, by the loops that it has."""

from __future__ import annotations

from functools import cache

import pytest
import torch

from lowering.gpu.instructions import Instruction, issued, of_amd, of_cubin, of_nvidia
from lowering.gpu.triton_compiler import Binary
from schedules.gpu.address import AddressDecode
from tests.lowering.gpu.compiled import compile_plan

ARCHITECTURES = ("sm_80", "sm_90", "gfx942")
KERNELS = "tests.lowering.gpu.counted"


def code(binary: Binary) -> list[Instruction]:
    return of_cubin(binary.cubin)[binary.name] if binary.cubin else of_amd(binary.asm["amdgcn"])


@cache
def compiled(terms: int, arch: str, plan: str = "plan") -> list[Instruction]:
    (binary,) = compile_plan(KERNELS, [torch.zeros(1 << 12)], terms, arch, plan)
    return code(binary)


@pytest.mark.parametrize("arch", ARCHITECTURES)
def test_an_iteration_has_its_multiply_adds_and_little_else(arch: str) -> None:
    def per_iteration(terms: int) -> float:
        found = compiled(terms, arch)
        return (issued(found, (300,)) - issued(found, (200,))) / 100

    # A term takes a load and a multiply-add, and may take up to two more instructions for an address.
    assert 2 * 24 <= per_iteration(24) <= 4 * 24 + 16
    assert 2 * 12 <= per_iteration(24) - per_iteration(12) <= 4 * 12


@pytest.mark.parametrize("arch", ARCHITECTURES)
def test_straight_code_counts_once(arch: str) -> None:
    found = compiled(24, arch, "plan_straight")
    assert 2 * 24 <= issued(found, (100,)) == issued(found, (1,)) <= 4 * 24 + 32


def test_the_schedule_that_exchanges_more_issues_more() -> None:
    """Loops do 18 % more compare-exchanges here than straight code, which leaves out those that change nothing."""

    def of(unroll: int) -> float:
        logits = torch.zeros(1024, 5, 4, dtype=torch.bfloat16)
        (binary,) = compile_plan(
            "lowering.gpu.address_decode.triton", [logits, 8], AddressDecode(unroll=unroll), "sm_80"
        )
        return issued(code(binary), (4,))

    straight, in_loops = of(1), of(0)
    assert in_loops > 1.18 * straight


def nvidia(*lines: str) -> list[Instruction]:
    """Return code as nvdisasm prints it; a line is a label with a colon, or an instruction."""
    text = "\n".join(line if line.endswith(":") else f"        /*0000*/                   {line} ;" for line in lines)
    return of_nvidia(f"//--------------------- .text.kernel    --------------------------\n.text.kernel:\n{text}")[
        "kernel"
    ]


FMA, LOAD, STORE = "FFMA R0, R1, R2, R0", "LDG.E R1, desc[UR4][R2.64]", "STG.E desc[UR4][R2.64], R0"
END = ("EXIT", ".L_x_9:", "BRA `(.L_x_9)", "NOP")
NEST = nvidia(
    FMA, ".L_x_1:", FMA, FMA, ".L_x_2:", FMA, FMA, FMA, "@P0 BRA `(.L_x_2)", FMA, "@!P1 BRA `(.L_x_1)", FMA, *END
)  # fmt: skip


def test_nested_loops_count_by_the_iterations_of_each() -> None:
    outside, outer, inner = 3, 4, 4
    assert issued(NEST, (10, 5)) == outside + 10 * (outer + 5 * inner)


def test_a_loop_of_one_iteration_is_not_in_the_code() -> None:
    assert issued(NEST, (10, 1, 5)) == issued(NEST, (10, 5))


def test_where_inner_loops_are_unrolled_the_outer_ones_count() -> None:
    assert issued(NEST, (10, 5, 7)) == issued(NEST, (10, 5))


def test_a_loop_that_the_plan_does_not_know_counts_once() -> None:
    assert issued(NEST, (10,)) == 3 + 10 * (4 + 4)
    assert issued(NEST, ()) == len(NEST) - 2, "neither the branch behind the end nor the padding"


def test_a_loop_apart_from_the_hot_one_counts_once() -> None:
    small = (".L_x_1:", FMA, "@P0 BRA `(.L_x_1)")
    hot = (".L_x_2:", FMA, FMA, "@P0 BRA `(.L_x_2)")
    assert issued(nvidia(*small, *hot, *END), (10,)) == 2 + 10 * 3 + 1


def test_an_unrolled_loop_is_known_by_the_loop_for_the_rest() -> None:
    unrolled = (".L_x_1:", *4 * (LOAD, FMA, STORE), "@P0 BRA `(.L_x_1)")
    rest = (".L_x_2:", LOAD, FMA, STORE, "@P0 BRA `(.L_x_2)")
    assert issued(nvidia(*unrolled, *rest, *END), (100,)) == 25 * 13 + 4 + 1
    other = (".L_x_2:", LOAD, LOAD, FMA, "@P0 BRA `(.L_x_2)")
    assert issued(nvidia(*unrolled, *other, *END), (100,)) == 100 * 13 + 4 + 1


def test_rare_code_that_branches_back_is_no_loop() -> None:
    rare = nvidia("@P0 BRA `(.L_x_2)", ".L_x_1:", FMA, "EXIT", ".L_x_2:", FMA, "BRA `(.L_x_1)", *END[1:])
    assert issued(rare, (100,)) == 5


def test_a_convergence_point_is_no_branch_and_a_subroutine_does_not_count() -> None:
    found = nvidia(
        "BSSY B0, `(.L_x_1)", "CALL.REL.NOINC `($__internal_0_$__div)", "EXIT", ".L_x_1:", "BSYNC B0", "EXIT",
        "$__internal_0_$__div:", FMA, FMA, "RET.REL.NODEC R4 `(kernel)",
    )  # fmt: skip
    assert issued(found, (1,)) == 3


def test_a_branch_under_a_condition_may_go_on() -> None:
    for branch in ("@P0 BRA `(.L_x_1)", "BRA.U UP0, `(.L_x_1)", "@!P0 BRA !P2, `(.L_x_1)"):
        assert issued(nvidia(branch, FMA, ".L_x_1:", *END), (1,)) == 3, branch
    assert issued(nvidia("BRA `(.L_x_1)", FMA, ".L_x_1:", *END), (1,)) == 2


def test_amd_counts_vector_instructions_also_where_a_loop_starts_in_its_middle() -> None:
    found = of_amd(
        "kernel:\n\ts_load_dword s0, s[0:1], 0x38\n\tv_mov_b32 v0, 0\n\ts_branch .LBB0_2\n"
        ".LBB0_1:                 ; latch\n\tv_add_f32 v0, v0, v1\n\ts_cbranch_scc0 .LBB0_3\n"
        ".LBB0_2:                 ; header\n\tv_mul_f32 v0, v0, v1\n\ts_cbranch_execz .LBB0_1\n"
        "\tglobal_load_dword v1, v2, s[2:3]\n\ts_branch .LBB0_1\n"
        ".LBB0_3:\n\ts_endpgm\n.Lfunc_end0:\n\tv_nop\n"
    )
    assert issued(found, (10,)) == 1 + 10 * 3
