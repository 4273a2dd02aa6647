"""``ramnet tune-model``."""

from __future__ import annotations

import tempfile
from pathlib import Path
from time import perf_counter

import click

from ramnet.finite import Finite


@click.command("tune-model")
@click.argument("checkpoint", type=click.Path(path_type=Path), required=False)
@click.option(
    "--format", "kind", type=click.Choice(["c", "onnx"]), default="c", show_default=True, help="Format of the export."
)
@click.option("--kernels", is_flag=True, help="Also try the tuned kernels in ONNX Runtime, with --format onnx.")
@click.option("--preset", help="A model configuration with random weights, instead of CHECKPOINT.")
@click.option("--budget", type=Finite(0, min_open=True), default=180.0, help="Seconds, set-up included.")
@click.option("--threads", type=click.IntRange(1, 1024), show_default="all cores", help="The most threads to try.")
@click.option("--seed", type=int, default=0, help="Seed of Optuna's sampler.")
@click.option(
    "--output",
    type=click.Path(file_okay=False, path_type=Path),
    default=Path("runs/tune/model"),
    help="Folder of the journal, which a later run resumes, and of the picture.",
)
@click.option(
    "--records",
    "records_file",
    type=click.Path(dir_okay=False, path_type=Path),
    show_default="deployments.jsonl in the user's data folder, or in the folder RAMNET_RECORDS",
    help="File that the chosen deployment is merged into.",
)
def tune_model(
    checkpoint: Path | None, kind: str, kernels: bool, preset: str | None, budget: float, threads: int | None,
    seed: int, output: Path, records_file: Path | None,
) -> None:  # fmt: skip
    """Find how a model is best deployed on this CPU: precision, loops and threads of the C library, or precision,
    kernels, threads and their spinning in ONNX Runtime.

    Int8 is tried first, then the precisions of the fewest bytes. Each trial checks a deployment of the whole model on
    samples and times a token, in a process that is killed if it hangs. The fastest deployment that predicts at most
    0.5 % worse than float32 is recorded, and `ramnet export --tuned` with the same format uses it.
    """
    begin = perf_counter()
    if (checkpoint is None) == (preset is None):
        raise click.UsageError("give either CHECKPOINT or --preset")
    if kernels and kind != "onnx":
        raise click.UsageError("--kernels has no meaning for --format c, which has them always; omit it")
    import torch

    from autotune.deployment import report
    from autotune.deployment.costs import Costs, Progress
    from autotune.deployment.search import Search
    from autotune.deployment.space import CSpace, OnnxSpace
    from autotune.deployment.stored import Stored
    from autotune.measure.bandwidth import bandwidth, cache_sizes
    from export.quality import calibration, held_out
    from ramnet import RamNetConfig, RamNetForCausalLM
    from ramnet.console import console, duration
    from ramnet.files import locked_alone, require_writable
    from ramnet.processes import usable_cores
    from schedules import deployment

    records_file = records_file or deployment.path()
    journal, picture = output / "journal.log", output / "front.png"
    require_writable(journal, picture, records_file)
    screen, beside = console(), console(stderr=True)
    text = windows = None
    if checkpoint is None:
        assert preset is not None
        torch.manual_seed(0)
        model = RamNetForCausalLM(RamNetConfig.preset(preset))
    else:
        model = RamNetForCausalLM.from_pretrained(checkpoint).float()
        try:
            text, windows = held_out(checkpoint), calibration(checkpoint)
        except ValueError as error:
            beside.print(f"precisions are judged by the model's own predictions: {error}", soft_wrap=True)
    most = threads or usable_cores()
    with (
        locked_alone(output / ".lock", f"{output} is in use: another process searches there; choose another --output"),
        beside.status("reading the weights") as status,
        tempfile.TemporaryDirectory(prefix="ramnet-") as folder,
    ):

        def show(progress: Progress) -> None:
            best = "" if progress.best is None else f"best {duration(progress.best)} a token, "
            status.update(
                f"{progress.trials} trials, {progress.failures} failed, {best}{progress.seconds_left:.0f} s left:"
                f" {progress.doing}"
            )

        config = model.config
        space = OnnxSpace(config, most, kernels) if kind == "onnx" else CSpace(config, most)
        stored = Stored(model.eval(), text, Path(folder), space, windows)
        in_cache = min(space.sizes.values()) <= most * cache_sizes()[2] // 2
        read = bandwidth("L2" if in_cache else "DRAM", most)
        with Search(
            stored, journal, seed=seed, bandwidth=read, budget=Costs(budget, begin), on_progress=show
        ) as search:  # fmt: skip
            search.run()
            record = search.finish()
            points = [*search.tried_points(), record.chosen]
        added = deployment.merge(records_file, record, [point.deployment for point in points])
    report.save(record, points, space.sizes, read, picture)
    screen.print(report.table(record, read))
    gain = f"not compared with {record.gain_over}, for lack of time"
    if record.gain is not None:
        gain = f"{record.gain:.2f}× the tokens/s of {record.gain_over} (spread {record.gain_spread:.0%})"
    loss = f"{record.chosen.loss:+.3%} bits a token, judged by {record.judged_by}"
    screen.print(f"{record.chosen.deployment}: {gain}, {loss}", soft_wrap=True)
    if record.prompt_seconds is not None:
        screen.print(f"a token of a prompt takes {duration(record.prompt_seconds)}")
    stays = "" if added else " keeps a faster one that this search had no time to try"
    screen.print(f"record: {records_file}{stays}", soft_wrap=True)
    screen.print(f"picture: {picture}", soft_wrap=True)
