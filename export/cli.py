"""``ramnet export`` and ``ramnet verify``."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

if TYPE_CHECKING:
    from rich.table import Table
    from torch import Tensor

    from export.manifest import Manifest
    from export.onnx.verify import Check
    from export.quality import HeldOut
    from ramnet import RamNetForCausalLM
    from ramnet.config import RamNetConfig
    from schedules.deployment import AnyDeployment


@click.command()
@click.argument("checkpoint", type=click.Path(path_type=Path))
@click.option(
    "--output",
    type=click.Path(path_type=Path),
    required=True,
    help="Directory to write, either new or an earlier export.",
)
@click.option(
    "--format",
    "kind",
    type=click.Choice(["onnx", "c", "wasm", "executorch"]),
    default="onnx",
    show_default=True,
    help="onnx: graphs of standard operators. c: a C library of the whole model. wasm: the same for browsers and Node,"
    " with a page. executorch: a program with its state.",
)
@click.option(
    "--precision", show_default="float32",
    help="Type of the weight matrices: float32, bfloat16, int8 or int4; in onnx float32, float16 or int8; in executorch"
    " other than float32 needs --kernels.",
)  # fmt: skip
@click.option("--kernels", is_flag=True, help="Run the memory ops on tuned kernels, in onnx and executorch.")
@click.option(
    "--target", show_default="cpu",
    help="Processor of compiled code, such as x86-64 (several) or rpi5, in c and in onnx with --kernels; cpu is this.",
)  # fmt: skip
@click.option("--ort", is_flag=True, help="Also write the graphs in onnxruntime's own format, with --format onnx.")
@click.option("--tuned", is_flag=True, help="Take what `ramnet tune-model` found on this CPU, in c and onnx.")
@click.option(
    "--calibrate", type=click.Path(path_type=Path), show_default="the text that CHECKPOINT was trained on",
    help="Text that --precision int4 is calibrated on, read as bytes.",
)  # fmt: skip
def export(
    checkpoint: Path, output: Path, kind: str, precision: str | None, kernels: bool, target: str | None, ort: bool,
    tuned: bool, calibrate: Path | None,
) -> None:  # fmt: skip
    """Export CHECKPOINT, with all that is needed to run it, to ONNX, C, WebAssembly or ExecuTorch.

    Nothing is written unless the export gives the results of PyTorch within a tolerance.
    """
    from ramnet import RamNetForCausalLM
    from ramnet.config import BYTES
    from ramnet.training.checkpoint import check_of_bytes

    given = {
        "--precision": precision,
        "--kernels": kernels,
        "--target": target,
        "--ort": ort,
        "--tuned": tuned,
        "--calibrate": calibrate,
    }
    for name, value in given.items():
        if value not in (None, False) and name not in _OPTIONS[kind]:
            raise click.UsageError(f"{name} has no meaning for --format {kind}; omit it")
    if tuned and (precision is not None or target is not None or kernels):
        raise click.UsageError("--tuned determines --precision, --kernels and --target; omit them")
    if kind == "onnx" and target is not None and not kernels:
        raise click.UsageError("--target needs --kernels; graphs of standard operators run on any processor")
    model = RamNetForCausalLM.from_pretrained(checkpoint)
    if model.config.vocab_size == BYTES:
        check_of_bytes(model.config, checkpoint)  # an export would take 256 ids for bytes
    precision, target = "float32" if precision is None else precision, "cpu" if target is None else target
    notices: list[str] = []
    deployment = _tuned(model.config, checkpoint, kind, notices) if tuned else None
    if kind == "onnx":
        text = _text(checkpoint, notices)
        _onnx(
            model, output, text=text, precision=precision, kernels=kernels, target=target, ort=ort,
            deployment=deployment,
        )  # fmt: skip
    elif kind == "executorch":
        from export.executorch.build import STAGES, export_executorch

        text = _text(checkpoint, notices)
        _described(export_executorch, STAGES, model, output, text=text, kernels=kernels, precision=precision)
    elif kind == "wasm":
        from export.web import STAGES, export_web

        windows = _calibration(checkpoint, model.config.vocab_size, precision, calibrate, notices)
        text = _text(checkpoint, notices)
        _described(export_web, STAGES, model, output, text=text, precision=precision, calibration=windows)
    else:
        from export.c.build import STAGES, export_c

        precision = deployment.precision if deployment else precision
        windows = _calibration(checkpoint, model.config.vocab_size, precision, calibrate, notices)
        _described(
            export_c, STAGES, model, output, text=_text(checkpoint, notices), target=target, deployment=deployment,
            precision=precision, calibration=windows,
        )  # fmt: skip
    written = sorted(path.name for path in output.iterdir())
    for notice in notices:  # at the end, so that an error is all that a command that fails prints
        click.echo(notice, err=True)
    size = sum((output / file).stat().st_size for file in written)
    click.echo(f"wrote {click.format_filename(output)}: {', '.join(written)} ({size / 1e6:.1f} MB)")


_OPTIONS = {
    "onnx": ("--precision", "--kernels", "--target", "--ort", "--tuned"),
    "c": ("--precision", "--target", "--tuned", "--calibrate"),
    "wasm": ("--precision", "--calibrate"),
    "executorch": ("--precision", "--kernels"),
}


def _onnx(model: RamNetForCausalLM, output: Path, **options: Any) -> None:
    """Export to ONNX and print the comparisons."""
    from export.onnx.build import STAGES, VerificationError, export_onnx
    from ramnet.console import console

    try:
        with _progress(STAGES) as advance:
            checks = export_onnx(model, output, on_progress=advance, **options)
    except VerificationError as error:
        console().print(_table(error.checks))
        raise
    console().print(_table(checks))


def _described(
    write: Callable[..., Manifest], stages: int, model: RamNetForCausalLM, output: Path, **options: Any
) -> None:
    """Export to a format whose description is a ``Manifest``, and print what was measured."""
    with _progress(stages) as advance:
        made = write(model, output, on_progress=advance, **options)
    if made.error is None:
        click.echo(f"not run here: verify it where it can be with: ramnet verify {click.format_filename(output)}")
    else:
        click.echo(f"verified: the logits are off by {made.error:.1e} (relative)")
    if made.speed is not None:
        click.echo(f"a token takes {made.speed.token_seconds * 1e6:.0f} µs")
    if made.quality is not None:
        loss = made.quality.bits_per_byte / made.quality.float32 - 1
        click.echo(
            f"{made.quality.bits_per_byte:.4f} bits per byte on text {made.quality.text} ({loss:+.2%} against float32)"
        )


def _calibration(
    checkpoint: Path, vocab_size: int, precision: str, file: Path | None, notices: list[str]
) -> list[Tensor] | None:
    """Return the windows that a precision is calibrated on. Raises ValueError if ``file`` cannot be used."""
    from export.quality import calibration
    from ramnet.config import BYTES

    if precision != "int4":
        if file is not None:
            raise click.UsageError("--calibrate needs --precision int4, the only one that is calibrated")
        return None
    if file is not None and vocab_size != BYTES:
        raise ValueError(
            f"--calibrate reads bytes, and the model has {vocab_size} tokens; without it, the text of training is read"
        )
    try:
        return calibration(checkpoint, file)
    except ValueError as error:
        if file is not None:
            raise
        notices.append(f"int4 is not calibrated: {error}; --calibrate names a text")
        return None


def _text(checkpoint: Path, notices: list[str]) -> HeldOut | None:
    """Return the text that the training held out, or None and a notice that says why there is none."""
    from export.quality import held_out

    try:
        return held_out(checkpoint)
    except ValueError as error:
        notices.append(f"bits per byte are not measured: {error}")
        return None


def _tuned(config: RamNetConfig, checkpoint: Path, kind: str, notices: list[str]) -> AnyDeployment:
    """Return the recorded deployment in a format, and add by what its loss was judged. Raises ValueError if there is
    none."""
    from lowering.targets import cpu_name
    from schedules.deployment import find

    record = find(config, cpu_name(), kind)
    if record is None:
        command = f"ramnet tune-model {click.format_filename(checkpoint)} --format {kind}"
        raise ValueError(f"{checkpoint} was not tuned on this CPU in this format; run: {command}")
    loss = f"{record.chosen.loss:+.2%} bits per token over float32, by {record.judged_by}"
    notices.append(f"deployed as tuned on {record.date[:10]}; the weights that were tuned had {loss}")
    return record.chosen.deployment


@contextmanager
def _progress(stages: int) -> Iterator[Callable[[str], None]]:
    """Show a progress bar. Yields what is called with the name of each stage when it is finished."""
    from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn

    from ramnet.console import console

    columns = (BarColumn(), TextColumn("{task.description}"), TimeElapsedColumn())
    screen = console(stderr=True)
    with Progress(*columns, console=screen, transient=True, disable=not screen.is_terminal) as progress:
        task = progress.add_task("starting", total=stages)
        yield lambda stage: progress.update(task, advance=1, description=stage)


@click.command()
@click.argument("directory", type=click.Path(path_type=Path))
def verify(directory: Path) -> None:
    """Check the files of the export in DIRECTORY, run it on its samples, and compare its logits with PyTorch's."""
    from export.check import check

    found = check(directory)
    click.echo(
        f"{click.format_filename(directory)} is as it was exported: its files have their digests, and the logits of"
        f" {found.tokens} tokens are off by {found.error:.1e} (relative; the tolerance is {found.tolerance:.0e})"
    )


def _table(checks: list[Check]) -> Table:
    from rich.table import Table
    from rich.text import Text

    columns = ("check", "batch", "logits", "state", "addresses", "tolerance", "")
    table = Table(*columns, title="Largest errors of onnxruntime against PyTorch")
    for check in checks:
        errors = (f"{error:.1e}" for error in (check.logits, check.state, check.addresses))
        verdict = "ok" if check.passed else Text("FAILED", style="red")
        table.add_row(check.name, str(check.batch), *errors, f"{check.tolerance:.0e}", verdict)
    return table
