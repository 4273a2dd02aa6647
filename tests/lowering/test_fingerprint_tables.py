"""The fingerprint names the modules that dispatching calls; it has a table of its own, as it imports no compiler."""

from __future__ import annotations

import pytest

from lowering import fingerprint


def named(compiler: str) -> dict[tuple[str, str], str]:
    """By op and form."""
    ops = fingerprint._TEMPLATES[compiler]
    return {(op, form): module for op, forms in ops.items() for form, module in forms.items()}


def test_of_a_cpu() -> None:
    pytest.importorskip("tvm", reason="the CPU's templates need tvm")
    from lowering.cpu.templates import TEMPLATES

    assert named("llvm") == {(op, ""): template.__module__ for op, template in TEMPLATES.items()}


def test_of_triton() -> None:
    pytest.importorskip("triton", reason="the GPU's plans need triton")
    from lowering.gpu.kernels import _plans

    assert named("triton") == {key: plan.__module__ for key, plan in _plans().items()}


def test_of_tir_for_gpus() -> None:
    from lowering.gpu.templates import _PROGRAMS

    assert {op for op, _ in named("tir")} == set(_PROGRAMS)
    assert set(named("tir").values()) <= fingerprint._read("lowering.gpu.templates")[1]
