"""``ramnet targets``."""

from __future__ import annotations

import click


@click.command()
def targets() -> None:
    """List the machines that kernels can be lowered for, and what can be done with each from here."""
    import importlib.util

    from rich.table import Table

    from lowering.targets import TARGETS, cpu_name
    from ramnet.console import console
    from schedules.records import load, records_path

    has_tvm = importlib.util.find_spec("tvm") is not None
    table = Table("target", "machine", "run", "compile", "records")
    for target in TARGETS.values():
        yes = "yes" if has_tvm else "no: pip install 'ramnet[tvm]'"
        table.add_row(
            target.name, f"{target.description} ({cpu_name()})", yes, yes, str(len(load(records_path(target.name))))
        )
    console().print(table)
