"""``ramnet kernel``."""

from __future__ import annotations

from pathlib import Path
from typing import Any, get_args

import click

from schedules.workload import Op


@click.command()
@click.argument("op", type=click.Choice(get_args(Op)))
@click.argument("sizes", nargs=-1)
@click.option("--target", default="cpu", help="The machine to compile for; `ramnet targets` lists them.")
@click.option(
    "--emit",
    type=click.Choice(["tir", "llvm", "asm", "ptx", "cuda"]),
    show_default="the compiler's input or first output",
    help="The language to print: TVMScript, LLVM IR, assembly, PTX or CUDA C.",
)
@click.option("--preset", default="340m", help="The model configuration that gives the sizes not in SIZES.")
@click.option("--checkpoint", type=click.Path(path_type=Path), help="A folder with a model, instead of --preset.")
def kernel(
    op: str, sizes: tuple[str, ...], target: str, emit: str | None, preset: str, checkpoint: Path | None
) -> None:
    """Print the code of the kernel that runs OP, under the schedule that is chosen for it.

    SIZES name the op's sizes by the paper's symbols, as in: ramnet kernel memory_scan N=16 T=1024. The kernel is not
    run, and no GPU is needed. The schedule and its source are printed on stderr.
    """
    from lowering import nvcc
    from lowering.gpu.offline import too_large, why_unsupported
    from lowering.listing import listing
    from lowering.targets import device_of, find, gpu_of
    from ramnet.config import RamNetConfig
    from schedules import records
    from schedules.shapes import parse

    is_gpu = find(target).gpu is not None
    config = RamNetConfig.load(checkpoint / "config.json") if checkpoint else RamNetConfig.preset(preset)
    few = {"T": 4096 if is_gpu else 1024, "R": 2 * config.layers[0].num_heads}
    given = {size.partition("=")[0] for size in sizes}
    text = " ".join((op, *sizes, *(f"{name}={few[name]}" for name in _missing(op) if name not in given)))
    workload = parse(text, config, is_gpu)

    def refused(schedule: Any) -> str | None:
        if not is_gpu:
            return None
        reason = why_unsupported(schedule, target, workload)
        if reason == nvcc.MISSING and emit in (None, "tir", "cuda"):  # which need no nvcc
            reason = None
        return reason or too_large(schedule, workload, gpu_of(target))

    choice = records.choose(workload, target, device_of(target), refused)
    click.echo(f"{workload.name} on {target}: {choice.schedule} ({choice.source})", err=True)
    click.echo(listing(workload, target, choice.schedule, emit))


def _missing(op: str) -> list[str]:
    """Return the sizes of an op that a model configuration does not determine."""
    from schedules.workload import AXES

    return [axis for axis in AXES[op] if axis in ("T", "R")]
