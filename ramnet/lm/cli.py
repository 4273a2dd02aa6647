"""``ramnet lm``: the language-modelling experiment."""

from __future__ import annotations

from pathlib import Path

import click

from ramnet.training import sweep_cli


@click.command()
@click.option("--scale", type=click.Choice(["quick", "night"]), default="quick", help="How much is trained.")
@click.option("--data", multiple=True, help="File of text; may be repeated.  [default: the standard library's sources]")
@sweep_cli.options("runs/lm")
def lm(scale: str, data: tuple[str, ...], output: Path, jobs: int, kernels: str) -> None:
    """Compare RAM-Net with a Transformer, GLA and Gated DeltaNet as language models of bytes."""
    from ramnet.lm import report
    from ramnet.lm.plan import SCALES, sweep

    sweep_cli.check(output, kernels, *report.FILES)
    plan = SCALES[scale]
    runs = sweep(plan, data)
    outcomes = sweep_cli.run(runs, output, jobs, kernels)
    for path in report.save(outcomes, plan, runs, output):
        click.echo(str(path))
