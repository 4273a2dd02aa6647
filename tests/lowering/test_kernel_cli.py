"""``ramnet kernel``: the code of a kernel, of the schedule that is chosen for it."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from lowering import targets
from schedules import records
from schedules.cpu import MemoryStep
from schedules.records import Record, Time
from schedules.workload import Workload

pytest.importorskip("tvm", reason="the code of the CPU's kernels needs tvm: pip install 'ramnet[tvm]'")

Run = Callable[..., tuple[int, str, str]]
SIZES = ("N=2", "K=2", "M=16", "D=8")


@pytest.fixture
def run(
    command_line: Callable[..., int], capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> Run:
    monkeypatch.setenv("RAMNET_RECORDS", str(tmp_path))

    def call(*arguments: object) -> tuple[int, str, str]:
        return command_line("kernel", *arguments), *capfd.readouterr()

    return call


def test_each_language_of_a_cpus_kernel_is_printed(run: Run) -> None:
    default, *found = [run("memory_step", *SIZES, *emit) for emit in (
        (), ("--emit", "tir"), ("--emit", "llvm"), ("--emit", "asm"))]  # fmt: skip
    assert all(status == 0 for status, *_ in found)
    tir, llvm, asm = (out for _, out, _ in found)
    assert "@T.prim_func" in tir and default[1] == tir
    assert "define" in llvm and "memory_step" in llvm
    assert ".text" in asm and "memory_step" in asm
    assert "on cpu: tile=8" in found[0][2] and "(default)" in found[0][2]


def test_the_schedule_is_that_of_the_record(run: Run) -> None:
    workload = Workload(op="memory_step", shape={"N": 2, "K": 2, "M": 16, "D": 8},
                        constants={"decay_power": 1.0, "eps": 1e-6})  # fmt: skip
    schedule = MemoryStep(tile=4, unroll=1, parallel=False, prefetch=0)
    time = Time(median=1e-6, spread=0.0, runs=9)
    records.merge(records.records_path("cpu"), [Record(
        workload=workload, target="cpu", device=targets.cpu_name(), knobs=schedule.model_dump(), how="measured",
        gain=1.0, gain_spread=0.0, tuned=time, default=time, trials=1, fingerprint="", versions={}, date="2026-01-01",
    )])  # fmt: skip
    status, out, err = run("memory_step", *SIZES)
    assert status == 0 and "tile=4 unroll=1 parallel=False prefetch=0 (record)" in err
    assert "T.vectorized(4)" in out


def test_a_gpus_kernel_is_printed_where_there_is_no_gpu(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("lowering.nvcc.nvcc", lambda: "nvcc")
    status, out, err = run("memory_scan", "N=256", "--target", "a100")
    assert status == 0 and "form=shared" in err and "nearest" not in err
    assert 'extern "C" __global__ void' in out and "memory_scan_kernel" in out
    monkeypatch.setattr("lowering.nvcc.nvcc", lambda: None)  # which turns CUDA C into a binary
    assert run("memory_scan", "N=256", "--target", "a100", "--emit", "cuda") == (0, out, err)


@pytest.mark.parametrize(
    ("arguments", "line"),
    [
        (("memory_step", "--emit", "ptx"), "ramnet: memory_step on cpu has no ptx; it has tir, llvm, asm"),
        (("memory_step", "--target", "mi300x", "--emit", "ptx"),
         "ramnet: memory_step on mi300x has no ptx; it has asm, llvm"),
        (("memory_step", "T=4"), "ramnet: shape 'memory_step T=4' has 'T=4'; memory_step has N, K, M, D"),
        (("decode_heads",), "ramnet: decode_heads has no kernel for cpu; there are address_decode"),
    ],
)  # fmt: skip
def test_an_unknown_language_op_or_size_is_one_line(run: Run, arguments: tuple[str, ...], line: str) -> None:
    status, out, err = run(*arguments)
    assert (status, out) == (1, "")
    assert err.splitlines()[-1].startswith(line)
