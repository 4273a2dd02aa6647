"""``ramnet targets``."""

from __future__ import annotations

from collections import Counter
from typing import TYPE_CHECKING

import click

if TYPE_CHECKING:
    from lowering.targets import Target

_NO_TVM, _NO_TRITON = "no: pip install 'ramnet[tvm]'", "no: pip install 'ramnet[gpu]'"


@click.command()
def targets() -> None:
    """List the machines that kernels can be compiled for, and what this machine can do for each.

    Run: it is this machine, so kernels can be measured. Compile: kernels can be compiled for it. Model: times can be
    predicted from the binaries, without running them. Records: the number of workloads with a measured or a modelled
    schedule; a record is stale if its kernel's code or compiler version has changed since.
    """
    from rich.table import Table

    from lowering.fingerprint import stale
    from lowering.targets import TARGETS, cpu_name, here
    from ramnet.console import console
    from schedules.records import known

    found = here()
    table = Table("target", "machine", "run", "compile", "model", "records")
    for target in TARGETS.values():
        is_here = target.gpu is None or (found is not None and found.name == target.name)
        machine = f"{target.description} ({cpu_name()})" if target.gpu is None else target.description
        hows = Counter("stale" if stale(record) else record.how.partition(",")[0] for record in known(target.name))
        counts = [f"{count} {how}" for how, count in sorted(hows.items())]
        table.add_row(target.name, machine, *_possible(target, is_here), ", ".join(counts) or "none")
    console().print(table)


def _possible(target: Target, is_here: bool) -> tuple[str, str, str]:
    """Return whether kernels of ``target`` can be run, compiled and modelled here, or why not."""
    from importlib.util import find_spec

    has_tvm, has_triton = find_spec("tvm") is not None, find_spec("triton") is not None
    if target.gpu is None:
        can = "yes" if has_tvm else _NO_TVM
        return can, can, "no: it is measured"
    able = "Triton"
    if "tir" in target.compilers and has_tvm:
        from lowering.nvcc import nvcc

        able += ", TIR" if nvcc() else ", TIR to CUDA C"
    can = "yes" if has_triton else _NO_TRITON
    return (can if is_here else "no: not here"), (able if has_triton else _NO_TRITON), can
