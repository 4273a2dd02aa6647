"""``ramnet convert``: a checkpoint in the other format."""

from __future__ import annotations

from pathlib import Path

import click


@click.command()
@click.argument("source", type=click.Path(path_type=Path))
@click.argument("output", type=click.Path(path_type=Path))
def convert(source: Path, output: Path) -> None:
    """Convert a checkpoint of this project to Hugging Face transformers' format, or back."""
    from ramnet.hf import convert

    convert(source, output)
