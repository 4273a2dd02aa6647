"""``ramnet bench``."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

import click

if TYPE_CHECKING:
    from autotune.bench.report import Report
    from autotune.bench.run import Run

    Measure = Callable[[Run, Callable[[int, int], None]], Iterator[Report]]


@click.command()
@click.option("--target", default="cpu", help="The target of the kernels, which must be this machine.")
@click.option("--quick", is_flag=True, help="Fewer rounds and no torch.compile.")
@click.option(
    "--output", type=click.Path(file_okay=False, path_type=Path), default=Path("runs/bench"),
    help="Folder for bench.json, bench.md and bench.png.",
)  # fmt: skip
@click.option(
    "--threads", type=click.IntRange(1, 1024), default=None,
    help="Threads of every table; by default 1 for the ops and all cores for the model.",
)  # fmt: skip
@click.option(
    "--part", "parts", multiple=True, show_default="all",
    help="On a GPU or with --peers, measure only this part (an unknown one lists them); may be repeated.",
)  # fmt: skip
@click.option(
    "--peers", is_flag=False, flag_value=sys.executable, default=None, metavar="[PYTHON]",
    help="Compare a CPU's tokens and prompts with llama.cpp and a Transformer in onnxruntime instead. PYTHON is the "
    "interpreter, or its environment, that has llama-cpp-python and gguf; by default this one.",
)  # fmt: skip
def bench(
    target: str, quick: bool, output: Path, threads: int | None, parts: tuple[str, ...], peers: str | None
) -> None:
    """Measure every op and the model: eager PyTorch, torch.compile, plain C++, kernels, and the bandwidth bound.

    All figures are medians, with interquartile ranges, of ratios within interleaved rounds. Each form is checked
    against the reference before it is timed. On a GPU, the scan, decoding and training are compared with attention and
    flash-linear-attention.
    """
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

    from autotune.bench import report
    from autotune.bench.run import Run
    from lowering import targets
    from ramnet.console import console
    from ramnet.files import require_writable
    from schedules.records import known

    screen = console()
    on_gpu = targets.find(target).gpu is not None
    measure: Measure = partial(_on_gpu, parts=parts) if on_gpu else partial(_on_cpu, threads=threads)
    if peers is not None:
        from autotune.bench.peers import everything as with_peers

        if on_gpu:
            raise ValueError(f"--peers is for CPUs; the target is {target}")
        python = with_peers.interpreter(peers)
        with_peers.check(parts, output)
        measure = partial(_with_peers, python=python, folder=output, threads=threads, parts=parts)
    elif on_gpu:
        from autotune.bench.gpu import everything

        if threads is not None:
            raise ValueError(f"--threads {threads} is for CPUs; the target is {target}")
        everything.check_target(target)
        everything.check_parts(parts)
    elif parts:
        raise ValueError(f"--part {parts[0]} is for GPUs and --peers; else all parts are measured on the CPU")
    require_writable(*(output / name for name in report.NAMES))
    known(target)
    # Progress is printed on stderr, so that stdout has only the tables.
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    with Progress(*columns, console=console(stderr=True)) as progress:
        task = progress.add_task("starting", total=None)
        run = Run(target, quick, threads or 1, on_step=lambda what: progress.update(task, description=what))
        for found in measure(run, lambda done, of: progress.update(task, completed=done, total=of)):
            paths = report.save(found, output)
    report.show(found, screen)
    screen.print(f"written: {', '.join(map(str, paths))}", soft_wrap=True)


def _on_cpu(run: Run, on_group: Callable[[int, int], None], threads: int | None) -> Iterator[Report]:
    """Yield the report after each group, so that it is saved even if the run is interrupted."""
    from autotune.bench.cpu import everything
    from ramnet.allocator import keep_freed_memory
    from ramnet.processes import usable_cores

    if not run.kernels:
        run.on_step("no kernels")
    if keep_freed_memory():
        run.notice("freed memory is kept for the next allocation, for every form alike")
    yield from everything.measure(run, threads or usable_cores(), on_group)


def _on_gpu(run: Run, on_group: Callable[[int, int], None], parts: tuple[str, ...]) -> Iterator[Report]:
    """Yield the report after each part, so that it is saved even if the run is interrupted."""
    from autotune.bench.gpu import everything, part_process

    for done, found in enumerate(everything.measure(run, parts=parts), start=1):
        on_group(done, len(parts or part_process.PARTS))
        yield found


def _with_peers(
    run: Run, on_group: Callable[[int, int], None], python: str, folder: Path, threads: int | None,
    parts: tuple[str, ...],
) -> Iterator[Report]:  # fmt: skip
    """Yield the report after each part, so that it is saved even if the run is interrupted."""
    from autotune.bench.peers import everything
    from autotune.bench.peers.parts import Place
    from ramnet.processes import usable_cores

    yield from everything.measure(run, Place(python, folder, threads or usable_cores()), parts, on_group)
