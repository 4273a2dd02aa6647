"""``ramnet tune``."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Literal, get_args

import click

from schedules.workload import Op

OPS: tuple[str, ...] = get_args(Op)


@click.command()
@click.option("--target", default="cpu", help="The machine to tune for; `ramnet targets` lists them.")
@click.option("--budget", type=float, show_default="180 without --trials", help="Seconds to spend in all.")
@click.option(
    "--trials", type=click.IntRange(min=1), help="Schedules to try for each op at most, those of earlier runs included."
)
@click.option(
    "--op", "ops", type=click.Choice(OPS), multiple=True, show_default="all", help="Tune only this op; may be repeated."
)
@click.option("--preset", default="340m", help="The model whose shapes are tuned for.")
@click.option("--checkpoint", type=click.Path(path_type=Path), help="A folder with a model, in place of --preset.")
@click.option("--batch-size", type=int, default=1, help="Sequences that the model works on at a time.")
@click.option("--length", type=int, default=1024, help="Tokens of a sequence in training and prefill.")
@click.option("--sampler", type=click.Choice(["tpe", "random"]), default="tpe", help="How Optuna picks what to try.")
@click.option("--seed", type=int, default=0, help="Of the sampler: same seed, same suggestions for the same times.")
@click.option("--threads", type=click.IntRange(min=1), show_default="all cores", help="Threads of the kernels.")
@click.option(
    "--build-limit",
    type=click.FloatRange(min=0, min_open=True),
    default=60.0,
    help="Seconds after which a build is killed.",
)
@click.option(
    "--run-limit",
    type=click.FloatRange(min=0, min_open=True),
    default=30.0,
    help="Seconds after which a run is killed.",
)
@click.option(
    "--output",
    type=click.Path(file_okay=False, path_type=Path),
    default=Path("runs/tune"),
    help="Folder of the journal and the report, in a folder for each target.",
)
@click.option(
    "--journal",
    type=click.Path(path_type=Path),
    show_default="journal.log in --output",
    help="File of all trials; a run goes on where the last one stopped, and several may share it.",
)
@click.option(
    "--records",
    "records_file",
    type=click.Path(path_type=Path),
    show_default="the project's",
    help="File that the best schedules are merged into.",
)
def tune(
    target: str, budget: float | None, trials: int | None, ops: tuple[str, ...], preset: str, checkpoint: Path | None,
    batch_size: int, length: int, sampler: Literal["tpe", "random"], seed: int, threads: int | None,
    build_limit: float, run_limit: float, output: Path, journal: Path | None, records_file: Path | None,
) -> None:  # fmt: skip
    """Find the fastest schedules of a model's memory ops on this machine, and compare them with eager PyTorch.

    Each candidate is built, checked against the reference and timed, in turn with the default schedule, in a process
    that is killed when it hangs. The best are measured anew before one is recorded.
    """
    from autotune import progress, report, tuner
    from autotune.worker import Worker
    from lowering import runtime, targets
    from ramnet.config import RamNetConfig
    from ramnet.console import console
    from schedules.of_model import of_model
    from schedules.records import records_path

    targets.find(target)
    runtime.match_threads()  # says what is missing, before anything is begun
    limit = tuner.Budget(180.0 if budget is None and trials is None else budget, trials)
    config = RamNetConfig.load(checkpoint / "config.json") if checkpoint else RamNetConfig.preset(preset)
    wanted = [w for w in of_model(config, batch_size, length) if not ops or w.op in ops]
    folder = output / target
    records_file = records_file or records_path(target)
    used = threads or os.cpu_count() or 1
    with Worker(used, build_limit, run_limit) as worker, progress.shown(console(stderr=True)) as on_progress:
        results = tuner.tune(
            target, wanted, worker, journal=journal or folder / "journal.log", records_file=records_file,
            budget=limit, threads=used, sampler=sampler, seed=seed, on_progress=on_progress,
        )  # fmt: skip
    page = folder / "report.html"
    report.write(results, page)
    screen = console()
    screen.print(report.table(results))
    screen.print(f"records: {records_file}", f"report: {page}", sep="\n", soft_wrap=True)
