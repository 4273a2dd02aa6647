"""``ramnet eval``: a model on the tasks of lm-evaluation-harness."""

from __future__ import annotations

import json
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import click


@click.command("eval")
@click.argument("model", type=click.Path(path_type=Path))
@click.option(
    "--tasks",
    required=True,
    metavar="NAMES",
    help="Tasks, groups or YAML files, separated by commas, as wikitext,arc_easy.",
)
@click.option(
    "--task-folder", type=click.Path(path_type=Path), metavar="DIR", help="Folder of further tasks' YAML files."
)
@click.option(
    "--tokenizer",
    type=click.Path(path_type=Path),
    metavar="PATH",
    help="tokenizer.json or its folder; by default the model's own, or bytes for 256 token ids.",
)
@click.option("--limit", type=click.IntRange(min=1), help="Evaluate only this many examples of each task.")
@click.option("--shots", type=click.IntRange(min=0), help="Examples in the context, instead of each task's own number.")
@click.option(
    "--max-length",
    type=click.IntRange(min=2),
    default=4096,
    show_default=True,
    help="Tokens of a window; longer texts are read in windows.",
)
@click.option("--batch-size", type=click.IntRange(min=1), default=8, show_default=True, help="Sequences in a batch.")
@click.option("--device", help="Device of the model; by default cuda if there is one, else cpu.")
@click.option(
    "--kernels", default="", help="Kernels of the memory ops: cpu (tuned, TVM), gpu (Triton); by default plain PyTorch."
)
@click.option("--output", type=click.Path(path_type=Path), metavar="FILE", help="Also write the results as JSON.")
def evaluate(  # noqa: PLR0913 - click hands over each option as a parameter
    model: Path,
    tasks: str,
    task_folder: Path | None,
    tokenizer: Path | None,
    limit: int | None,
    shots: int | None,
    max_length: int,
    batch_size: int,
    device: str | None,
    kernels: str,
    output: Path | None,
) -> None:  # fmt: skip
    """Evaluate MODEL, a checkpoint folder, on tasks of lm-evaluation-harness."""
    missing = [name for name in ("lm_eval", "transformers", "accelerate") if find_spec(name) is None]
    if missing:
        raise click.ClickException(f"ramnet eval needs {missing[0]}: pip install 'ramnet[eval]'")
    import torch

    from ramnet import ops
    from ramnet.evaluation import harness
    from ramnet.files import require_writable, write_text_atomic

    if output is not None:
        require_writable(output)
    with ops.using(kernels):
        found = harness.evaluate(
            model, [name.strip() for name in tasks.split(",") if name.strip()], task_folder=task_folder,
            tokenizer=tokenizer, limit=limit, shots=shots, max_length=max_length, batch_size=batch_size,
            device=device or ("cuda" if torch.cuda.is_available() else "cpu"),
        )  # fmt: skip
    _print(found)
    if output is not None:
        write_text_atomic(output, json.dumps(found, indent=2, sort_keys=True) + "\n")


def _print(found: dict[str, Any]) -> None:
    """Print a line for each metric of each task or group, with its standard error where there is one."""
    from rich.table import Table

    from ramnet.console import console

    table = Table("task", "shots", "examples", "metric", "value", "standard error")
    for task, values in (found["results"] | found.get("groups", {})).items():
        shots, examples = found["n-shot"].get(task, ""), found["n-samples"].get(task, {}).get("effective", "")
        for name, value in sorted(values.items()):
            metric, _, part = name.partition(",")
            if part and not metric.endswith("_stderr") and isinstance(value, float):
                error = values.get(f"{metric}_stderr,{part}")
                shown = f"{error:.4f}" if isinstance(error, float) else ""
                label = metric if part == "none" else f"{metric} ({part})"
                table.add_row(task, str(shots), str(examples), label, f"{value:.4f}", shown)
    console().print(table)
