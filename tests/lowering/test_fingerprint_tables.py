"""The fingerprint's table of templates, which imports no compiler, agrees with the tables that dispatch calls."""

from __future__ import annotations

from pathlib import Path

import pytest

from lowering import fingerprint
from schedules.records import Record, shipped_path


def named(compiler: str) -> dict[tuple[str, str], str]:
    """Return the modules of templates by op and form."""
    ops = fingerprint._TEMPLATES[compiler]
    return {(op, form): module for op, forms in ops.items() for form, module in forms.items()}


def test_templates_of_the_cpu() -> None:
    pytest.importorskip("tvm", reason="the CPU's templates need tvm")
    from lowering.cpu.templates import TEMPLATES

    assert named("llvm") == {(op, ""): template.__module__ for op, template in TEMPLATES.items()}


def test_plans_of_triton() -> None:
    pytest.importorskip("triton", reason="the GPU's plans need triton")
    from lowering.gpu.kernels import _triton

    assert named("triton") == {key: plan.__module__ for key, plan in _triton().items()}


def test_templates_of_tir_for_gpus() -> None:
    from lowering.gpu.kernels import _tir

    plans, templates = _tir(), named("tir")
    assert templates.keys() == plans.keys()
    for key, template in templates.items():
        assert template in fingerprint._read(plans[key].__module__)[1], key


@pytest.mark.parametrize("path", sorted(shipped_path("cpu").parent.glob("*.jsonl")), ids=lambda path: path.stem)
def test_shipped_records_are_of_this_code(path: Path) -> None:
    """Where one is not, the target is tuned again (`make tune TARGET=…`) and its records are shipped anew."""
    for line in path.read_text().splitlines():
        record = Record.model_validate_json(line)
        assert fingerprint.stale(record) != "other code", f"{record.workload.op} for {record.target}"
