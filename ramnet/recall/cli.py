"""``ramnet recall``: the recall experiment of the paper."""

from __future__ import annotations

from pathlib import Path

import click

from ramnet.training import sweep_cli


@click.command()
@click.option(
    "--scale",
    type=click.Choice(["quick", "day", "paper", "ablations"]),
    default="quick",
    help="How much is trained; ablations changes the defaults of one RAM-Net, one at a time.",
)
@sweep_cli.options("runs/recall")
def recall(scale: str, output: Path, jobs: int, kernels: str) -> None:
    """Compare RAM-Net's recall with other mixers by state size, and by the order of its addresses."""
    from ramnet.recall import report
    from ramnet.recall.plan import SCALES, sweep

    sweep_cli.check(output, kernels, *report.FILES)
    plan = SCALES[scale]
    runs = sweep(plan)
    outcomes = sweep_cli.run(runs, output, jobs, kernels)
    for path in report.save(outcomes, plan, runs, output):
        click.echo(str(path))
