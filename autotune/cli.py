"""``ramnet tune``."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from time import perf_counter
from typing import Literal, get_args

import click

from schedules.workload import Op

OPS: tuple[str, ...] = get_args(Op)


@click.command()
@click.option("--target", default="cpu", help="The machine to tune for; `ramnet targets` lists them.")
@click.option(
    "--budget", type=float, show_default="180 without --trials", help="Seconds to spend in all, including the report."
)
@click.option(
    "--trials",
    type=click.IntRange(min=1),
    help="The most schedules to try for each op, including those of earlier runs.",
)
@click.option(
    "--op", "ops", type=click.Choice(OPS), multiple=True, show_default="all", help="Tune only this op; may be repeated."
)
@click.option("--preset", default="340m", help="The model configuration to tune for.")
@click.option("--checkpoint", type=click.Path(path_type=Path), help="A folder with a model, instead of --preset.")
@click.option(
    "--batch-size",
    "batch_sizes",
    type=int,
    multiple=True,
    show_default="1 on a CPU; on a GPU 16 in training, 64 in decoding",
    help="Batch size of the model; may be repeated.",
)
@click.option(
    "--length",
    "lengths",
    type=int,
    multiple=True,
    show_default="1024 on a CPU, 4096 on a GPU",
    help="Tokens of a sequence in training and prefill; may be repeated.",
)
@click.option(
    "--shape",
    "shapes",
    multiple=True,
    metavar='"OP AXIS=SIZE …"',
    help='A workload such as "memory_scan N=16 T=1024", instead of those of the model; may be repeated.',
)
@click.option(
    "--trace",
    "script",
    type=click.Path(exists=True, dir_okay=False, path_type=Path),
    help="Run this Python program and tune the workloads that it calls, by their shares of its time.",
)
@click.option(
    "--model",
    "modelled",
    is_flag=True,
    help="Compile and model candidates without running them, even if the GPU is available.",
)
@click.option("--sampler", type=click.Choice(["tpe", "random"]), default="tpe", help="Optuna's sampler.")
@click.option(
    "--seed", type=int, default=0, help="Seed of the sampler; equal seeds give equal suggestions for equal times."
)
@click.option("--threads", type=click.IntRange(1, 1024), show_default="all cores", help="Threads of the kernels.")
@click.option("--build-limit", default=60.0, help="Seconds after which a build is killed.")
@click.option("--run-limit", default=30.0, help="Seconds after which a run is killed.")
@click.option(
    "--output",
    type=click.Path(file_okay=False, path_type=Path),
    default=Path("runs/tune"),
    help="Folder of the journal and the report, with a subfolder for each target.",
)
@click.option(
    "--journal",
    type=click.Path(path_type=Path),
    show_default="journal.log in --output",
    help="File of all trials; a run resumes the previous one, and several runs may share it.",
)
@click.option(
    "--records",
    "records_file",
    type=click.Path(path_type=Path),
    show_default="the target's in the user's data folder, or in the folder RAMNET_RECORDS",
    help="File that the best schedules are merged into.",
)
def tune(  # noqa: PLR0913 - click hands over each option as a parameter
    target: str, budget: float | None, trials: int | None, ops: tuple[str, ...], preset: str, checkpoint: Path | None,
    batch_sizes: tuple[int, ...], lengths: tuple[int, ...], shapes: tuple[str, ...], script: Path | None,
    modelled: bool, sampler: Literal["tpe", "random"], seed: int, threads: int | None, build_limit: float,
    run_limit: float, output: Path, journal: Path | None, records_file: Path | None,
) -> None:  # fmt: skip
    """Find the fastest schedules of a model's memory ops on this machine, and compare them with eager PyTorch.

    Each candidate is compiled, checked against the reference and timed alternately with the default schedule, in a
    process that is killed if it hangs. The best are measured again before one is recorded. For a GPU that this machine
    does not have, candidates are compiled and ranked by a time model. Nothing is run then, and records say so.
    """
    begin = perf_counter()
    from autotune import progress, report
    from autotune.call import prepare
    from ramnet.config import RamNetConfig
    from ramnet.console import console
    from ramnet.files import require_writable

    if script is not None and (shapes or batch_sizes or lengths):
        raise click.UsageError("--trace determines the shapes; omit --shape, --length and --batch-size")
    if shapes and (batch_sizes or lengths):
        raise click.UsageError("--shape gives the sizes; omit --length and --batch-size")
    folder = output / target
    tuning = prepare(
        RamNetConfig.load(checkpoint / "config.json") if checkpoint else RamNetConfig.preset(preset), target,
        budget=budget, trials=trials, ops=ops, batch_sizes=batch_sizes, lengths=lengths, shapes=shapes,
        workloads=None if script is None else (), modelled=modelled, sampler=sampler, seed=seed, threads=threads,
        build_limit=build_limit, run_limit=run_limit, journal=journal or folder / "journal.log",
        records_file=records_file,
    )  # fmt: skip
    page = folder / "report.html"
    require_writable(tuning.journal, tuning.records_file, page)
    report.require_libraries()
    calls = None
    if script is not None:
        from autotune.trace import trace

        found, calls = trace(script, target)
        tuning = replace(tuning, workloads=[workload for workload in found if not ops or workload.op in ops])
        begin = perf_counter()  # the traced program does not count towards the budget
    if not tuning.workloads:
        raise click.UsageError(f"{', '.join(ops)} has no workload on {target}")
    screen, beside = console(), console(stderr=True)
    if tuning.modelled:
        beside.print(f"{target}: its kernels are compiled, and their times modelled, not run", soft_wrap=True)
    if tuning.budget.seconds:  # drawing the report takes some seconds
        seconds = tuning.budget.seconds - min(tuning.budget.seconds / 6, 10.0)
        tuning = replace(tuning, budget=replace(tuning.budget, seconds=seconds))
    with progress.shown(beside) as on_progress:
        results = tuning.run(on_progress, begin=begin, calls=calls)
    for table in (report.table, report.chosen) if results else ():
        screen.print(table(results))
    for note in report.notes(results, tuning.workloads):
        screen.print(note, soft_wrap=True)
    if not results:
        raise click.ClickException("no op had the time for a result; give a larger --budget")
    screen.print(f"records: {tuning.records_file}", soft_wrap=True)
    report.write(results, page)
    screen.print(f"report: {page}", soft_wrap=True)
