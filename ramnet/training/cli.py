"""``ramnet train``: train a model on recall or on text."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click
from click.core import ParameterSource

from ramnet.finite import Finite

if TYPE_CHECKING:
    from rich.console import Console

    from ramnet.training.checkpoint import Progress
    from ramnet.training.footprint import Rows
    from ramnet.training.loop import TrainingTask
    from ramnet.training.model import Config, Model
    from ramnet.training.objective import Execution
    from ramnet.training.parallel import Parallel
    from ramnet.training.recipe import Recipe

    # Both take the saved settings of a run that is resumed; the second also the rows of a step.
    MakeTask = Callable[[Config, dict[str, Any]], TrainingTask]
    MakeRows = Callable[[Config, dict[str, Any], int], Rows]


@click.group()
def train() -> None:
    """Train a model: `mqar` on recall, `text` on bytes."""


def _options(**defaults: Any) -> Callable[[Callable[..., None]], Callable[..., None]]:
    """Add the options that all tasks share, with the defaults of one task."""
    options = [
        click.option("--preset", default=defaults["preset"], help="Model configuration: tiny, mqar or 340m."),
        click.option("--output", type=click.Path(path_type=Path), default=defaults["output"],
                     help="Folder for checkpoints; without it, nothing is written."),
        click.option("--from", "source", type=click.Path(path_type=Path), metavar="CHECKPOINT",
                     help="Start a new run from the weights and the configuration of this folder."),
        click.option("--resume", is_flag=True,
                     help="Continue from the checkpoint in --output, with its options but --parallel and --kernels."
                          " Larger --steps or --seconds extend the run; the learning rate then follows a cosine over"
                          " the new total."),
        click.option("--steps", type=int,
                     help="Total number of steps, over which the learning rate decays on a cosine."),
        click.option("--seconds", type=float, show_default=f"{defaults['seconds']:g} without --steps",
                     help="Total training time in seconds, without evaluations, over which the learning rate decays on"
                          " a cosine."),
        click.option("--batch-size", type=int, default=defaults["batch_size"], help="Examples in a step."),
        click.option("--learning-rate", type=float, default=defaults["learning_rate"],
                     help="Peak learning rate, after warm-up."),
        click.option("--final-learning-rate", type=float, default=0.0, help="Learning rate at the end of the cosine."),
        click.option("--warmup-steps", type=int, default=50, help="Steps of linear warm-up."),
        click.option("--weight-decay", type=float, default=0.0,
                     help="Weight decay of AdamW on the matrices of linear layers."),
        click.option("--clip-norm", type=float, default=1.0, help="Largest norm of the gradient."),
        click.option("--precision", type=click.Choice(["float32", "bfloat16"]), default="float32",
                     help="Of matrix products. Weights, moments, addresses and memory are float32 in either case."),
        click.option("--micro-batch", type=click.IntRange(1, 2**31), metavar="ROWS",
                     help="Compute a step's gradient from parts of this many examples, to need less memory."),
        click.option("--recompute/--no-recompute", default=False,
                     help="Recompute each block's activations in the backward pass, to need less memory."),
        click.option("--parallel", type=click.Choice(["ddp", "fsdp"]), default="ddp",
                     help="Under torchrun: whether every process keeps all weights and moments, or a share of them."),
        click.option("--seed", type=int, default=0, help="Seed of the initial weights and the data."),
        click.option("--kernels", show_default="those of the machine",
                     help="Kernels of the memory ops: cpu (tuned, TVM), gpu (Triton) or reference (plain PyTorch)."),
        click.option("--compile/--no-compile", "compiled", default=False, help="Compile the model with torch.compile."),
        click.option("--checkpoint-seconds", type=Finite(0), default=30.0,
                     help="Seconds between checkpoints, each evaluated on held-out data."),
        click.option("--dry-run", is_flag=True,
                     help="Print the memory, operations and time that the run needs; train and write nothing."),
    ]  # fmt: skip

    def decorate(command: Callable[..., None]) -> Callable[..., None]:
        for option in reversed(options):
            command = option(command)
        return click.pass_context(command)

    return decorate


@train.command()
@click.option("--pairs", type=int, default=8, help="Key-value pairs to remember.")
@click.option("--length", type=int, default=64, help="Tokens of an example; even, at least four for each pair.")
@_options(preset="mqar", output=None, seconds=180.0, batch_size=64, learning_rate=1e-2)
def mqar(ctx: click.Context, pairs: int, length: int, **options: Any) -> None:
    """Multi-query associative recall: recall the value that followed a key."""

    from ramnet.training.footprint import Rows
    from ramnet.training.mqar import Mqar

    def task(config: Config, saved: dict[str, Any]) -> Mqar:
        setting = {"pairs": pairs, "length": length, "vocab_size": config.vocab_size}
        return Mqar(**(setting | _saved(ctx, saved, "pairs", "length")))

    def rows(config: Config, saved: dict[str, Any], size: int) -> Rows:
        asked = task(config, saved)
        return Rows(size, asked.length, asked.pairs)

    _run(ctx, options, task, rows, seconds=180.0)


def _configure(ctx: click.Context, _: click.Parameter, path: Path | None) -> None:
    """Take the defaults of the options from a file."""
    from ramnet.training.settings import read

    if path is not None:
        ctx.default_map = read(path)


@train.command()
@click.option("--config", type=click.Path(path_type=Path), is_eager=True, expose_value=False, callback=_configure,
              metavar="FILE",
              help="A TOML file of options, such as configs/340m.toml; those given here override it.")  # fmt: skip
@click.option("--data", type=click.Path(path_type=Path), multiple=True, metavar="FILE...",
              help="Text to train on, instead of the Python standard library's sources. Each file is a document, and"
                   " the \"text\" of each line of a .jsonl file.")  # fmt: skip
@click.argument("files", type=click.Path(path_type=Path), nargs=-1, metavar="")
@click.option("--tokenizer", type=click.Path(path_type=Path), metavar="FILE",
              help="A tokenizer.json of Hugging Face, whose tokens are kept in --output; without it, tokens are"
                   " bytes.")  # fmt: skip
@click.option("--length", type=int, default=256, help="Tokens of a training row.")
@click.option("--packed", is_flag=True,
              help="Fill rows with several documents, which stay apart, instead of windows within one: for documents"
                   " shorter than a row.")  # fmt: skip
@click.option("--carry", is_flag=True,
              help="Read each document from its beginning in windows that follow one another, with the state of the"
                   " window before (truncated backpropagation).")  # fmt: skip
@_options(preset="tiny", output="runs/text", seconds=240.0, batch_size=8, learning_rate=1e-2)
def text(
    ctx: click.Context, data: tuple[Path, ...], files: tuple[Path, ...], tokenizer: Path | None, length: int,
    packed: bool, carry: bool, **options: Any,
) -> None:  # fmt: skip
    """A language model of bytes, or of a tokenizer's tokens."""
    from ramnet.training.footprint import Rows
    from ramnet.training.text import Text

    if files and not data:
        raise click.UsageError(f"{files[0]} is given without an option; give files with --data")
    typed = [name for name in ("packed", "carry") if ctx.get_parameter_source(name) is ParameterSource.COMMANDLINE]
    if len(typed) == 2:
        raise click.UsageError("--packed and --carry are both given; rows are of one kind")
    if typed:  # which overrides a file's
        packed, carry = (name in typed for name in ("packed", "carry"))

    def setting(saved: dict[str, Any]) -> dict[str, Any]:
        windows = "packed" if packed else "carried" if carry else saved.get("windows", "within a document")
        found = {"files": [*data, *files], "length": length, "windows": windows, "tokenizer": tokenizer}
        found |= _saved(ctx, saved, "length", "tokenizer", "digest") | ({} if data else _saved(ctx, saved, "files"))
        return found

    def task(config: Config, saved: dict[str, Any]) -> Text:
        return Text.of(setting(saved), config.vocab_size, options["output"] / "tokens")

    def rows(config: Config, saved: dict[str, Any], size: int) -> Rows:
        asked = setting(saved)
        Text.check(asked, config.vocab_size)
        return Rows(size, asked["length"], asked["length"], asked["windows"] == "carried")

    _run(ctx, options, task, rows, seconds=240.0)


def _run(
    ctx: click.Context, options: dict[str, Any], make_task: MakeTask, rows: MakeRows, seconds: float,
) -> None:  # fmt: skip
    from ramnet.console import console
    from ramnet.training.parallel import processes, torchruns

    screen = console()
    if options["dry_run"]:
        screen.quiet = (parallel := torchruns(options["parallel"])).rank > 0
        _dry_run(ctx, options, rows, seconds, parallel, screen)
        return
    from ramnet.training.checkpoint import alone

    with processes(options["parallel"]) as parallel, alone(None if parallel.rank else options["output"]):
        screen.quiet = parallel.rank > 0
        _train(ctx, options, make_task, seconds, parallel, screen)


def _settled(
    ctx: click.Context, options: dict[str, Any], parallel: Parallel, seconds: float
) -> tuple[Recipe, Progress | None]:
    """Return the recipe, and the progress of the run that is resumed, whose execution ``options`` then have."""
    from ramnet.training import checkpoint, metrics
    from ramnet.training.recipe import BUDGET, Recipe

    output, source = options["output"], options["source"]
    resume = options["resume"] or (parallel.store is not None and output is not None and _restarted(parallel, output))
    recipe = {name: options[name] for name in Recipe.model_fields if name in options}
    progress = None
    if source is not None:
        _check_source(ctx, source, output, options["resume"])
    if resume:
        if output is None:
            raise click.UsageError("--resume needs --output, the folder to resume from")
        progress = checkpoint.Progress.load(output)
        # If the user gives either budget, it replaces both budgets of the checkpoint.
        kept = set(recipe) - (set(BUDGET) if any(_given(ctx, name) for name in BUDGET) else set())
        saved = progress.recipe.model_dump()
        recipe |= _saved(ctx, saved, *kept) | {name: saved[name] for name in saved.keys() - recipe.keys()}
        options |= _saved(ctx, progress.model_dump(), "micro_batch", "recompute", "compiled", "checkpoint_seconds")
    elif recipe["steps"] is None and recipe["seconds"] is None:
        recipe["seconds"] = seconds
    checked = Recipe(**recipe)
    if output is not None:
        checkpoint.check_writable(output, *checkpoint.FILES, metrics.FILE, metrics.PICTURE)
    return checked, progress


def _model(ctx: click.Context, options: dict[str, Any], progress: Progress | None, screen: Console) -> Model:
    """Return the model that training begins with, or that a checkpoint is loaded into."""
    import torch

    from ramnet.config import RamNetConfig
    from ramnet.model import RamNetForCausalLM
    from ramnet.training.model import make

    if progress is not None and not _given(ctx, "preset"):
        return make(progress.config)
    source = options["source"]
    if source is None:
        return RamNetForCausalLM(RamNetConfig.preset(options["preset"]))
    model = RamNetForCausalLM.from_pretrained(source)
    for kind in {p.dtype for p in model.parameters() if p.dtype.itemsize < 4}:
        if kind == torch.float16 and options["precision"] == "bfloat16":
            raise click.UsageError(f"{source} holds weights in {kind}; --precision bfloat16 needs float32 or bfloat16")
        # Measured for bfloat16 weights of standard deviation 0.05: AdamW's step of 1e-4 leaves 54% as they were.
        screen.print(f"{source} holds weights in {kind}, where small updates are lost; convert it to float32 first")
    return model


def _execution(options: dict[str, Any]) -> Execution:
    from ramnet.training.objective import Execution

    return Execution(options["compiled"], options["micro_batch"], options["recompute"])


def _dry_run(
    ctx: click.Context, options: dict[str, Any], rows: MakeRows, seconds: float, parallel: Parallel, screen: Console
) -> None:
    import torch
    from rich.table import Table

    from ramnet.training.dry_run import describe

    recipe, progress = _settled(ctx, options, parallel, seconds)
    with torch.device("meta"):
        model = _model(ctx, options, progress, screen)
    kernels = _kernels(options, screen)
    asked = rows(model.config, {} if progress is None else progress.task, recipe.batch_size)
    table = Table.grid(padding=(0, 1))
    for line in describe(model, asked, recipe, _execution(options), parallel, kernels):
        table.add_row(*line)
    screen.print(table)


def _train(
    ctx: click.Context, options: dict[str, Any], make_task: MakeTask, seconds: float, parallel: Parallel,
    screen: Console,
) -> None:  # fmt: skip
    import torch

    from ramnet import ops
    from ramnet.allocator import keep_freed_memory
    from ramnet.training.loop import train as run_training
    from ramnet.training.metrics import picture

    keep_freed_memory()
    recipe, progress = _settled(ctx, options, parallel, seconds)
    torch.manual_seed(recipe.seed)
    model, output = _model(ctx, options, progress, screen), options["output"]
    model.to("cuda" if torch.cuda.is_available() else "cpu")
    with parallel.first_before_others():  # the first writes the tokens that the others read
        task = make_task(model.config, {} if progress is None else progress.task)
    with ops.using(_kernels(options, screen)):
        result = run_training(
            model, task, recipe, output=output, resume=progress is not None, execution=_execution(options),
            parallel=parallel, checkpoint_seconds=options["checkpoint_seconds"],
            console=None if parallel.rank else screen,
        )  # fmt: skip
    if output is not None and parallel.rank == 0:
        picture(output)
    where = f"; {output}" if output else ""
    steps = f"{result.step} steps" + (f", {result.skipped} of them skipped" if result.skipped else "")
    screen.print(f"{task.metric} {result.metric:.4f} after {steps}, {result.elapsed:.0f} s{where}", soft_wrap=True)


def _restarted(parallel: Parallel, output: Path) -> bool:
    """Return whether torchrun has restarted the processes after one failed, and there is a checkpoint to go on from.

    Raises UsageError if there is a checkpoint that no attempt of this run has written.
    """
    from ramnet.training.checkpoint import FILE

    exists = (output / FILE).exists()
    if exists and not parallel.begun():
        raise click.UsageError(f"{output} holds a run; continue it with --resume, or choose another --output")
    parallel.begin()
    return exists


def _check_source(ctx: click.Context, source: Path, output: Path | None, resume: bool) -> None:
    """Raise UsageError if ``--from`` is combined with an option that it excludes."""
    if resume:
        raise click.UsageError("--from starts a new run and --resume continues one; give only one of them")
    if _given(ctx, "preset"):
        raise click.UsageError("--from uses the configuration of its checkpoint; omit --preset")
    if output is not None and output.resolve() == source.resolve():
        raise click.UsageError(f"the new run would replace {source}, which it starts from; choose another --output")


def _given(ctx: click.Context, name: str) -> bool:
    """Return whether the user gave this option, on the command line or in the file of ``--config``."""
    return ctx.get_parameter_source(name) in (ParameterSource.COMMANDLINE, ParameterSource.DEFAULT_MAP)


def _saved(ctx: click.Context, saved: dict[str, Any], *names: str) -> dict[str, Any]:
    """Return the checkpoint's settings of these names, except those that the user gave."""
    return {name: saved[name] for name in names if name in saved and not _given(ctx, name)}


def _kernels(options: dict[str, Any], screen: Console) -> str:
    """Return the backend to use. It is the reference, with a notice, if its package is missing."""
    import torch

    from ramnet import ops

    kernels = options["kernels"] or ("gpu" if torch.cuda.is_available() else "cpu")
    if kernels in ("", "reference"):
        return ""
    try:
        ops.registered(kernels)
    except ImportError as error:
        screen.print(f"kernels {kernels!r} cannot be loaded ({error}); the plain PyTorch reference runs instead")
        return ""
    return kernels
