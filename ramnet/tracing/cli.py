"""``ramnet trace``."""

from __future__ import annotations

import codecs
import os
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING

import click

if TYPE_CHECKING:
    from collections.abc import Sequence

    from rich.table import Table

    from ramnet.tracing.heads import HeadTrace

PICTURE, PAGE = "trace.png", "trace.html"


@click.command()
@click.argument("model", type=click.Path(path_type=Path))
@click.argument("text")
@click.option(
    "--output",
    type=click.Path(path_type=Path),
    default=Path("runs/trace"),
    show_default=True,
    help=f"Folder for {PICTURE} and {PAGE}.",
)
@click.option(
    "--ids", is_flag=True, help="TEXT holds token ids, separated by spaces; for models of other tokens than bytes."
)
@click.option(
    "--layer",
    "layers",
    type=int,
    multiple=True,
    metavar="NUMBER",
    help="Show this layer, counted from 1; may be repeated. Without it, all are shown.",
)
@click.option(
    "--head",
    "heads",
    type=int,
    multiple=True,
    metavar="NUMBER",
    help="Show this head, counted from 1; may be repeated. Without it, all are shown.",
)
@click.option(
    "--kernels", default="", help="Backend of the memory ops, such as cpu; the plain PyTorch reference if empty."
)
def trace(
    model: Path, text: str, output: Path, ids: bool, layers: tuple[int, ...], heads: tuple[int, ...], kernels: str
) -> None:  # fmt: skip
    """Show which slots the heads of MODEL, a checkpoint's folder, write and read, and whose writes each token of TEXT
    reads: a table, a picture, and a page that shows it for the token pointed at."""
    if not text.strip() if ids else not text:
        raise click.UsageError("TEXT is empty; give at least one token")
    if find_spec("matplotlib") is None:
        raise click.ClickException("the picture needs matplotlib: pip install 'ramnet[tune]'")
    numbers = _numbers(text) if ids else list(os.fsencode(text))  # the bytes of the command line need not be UTF-8
    import torch

    from ramnet import RamNetForCausalLM, ops
    from ramnet.console import console
    from ramnet.files import require_writable, written_aside
    from ramnet.tracing import page, picture
    from ramnet.tracing.heads import heads_of
    from ramnet.tracing.record import trace as record
    from ramnet.training.checkpoint import check_of_bytes

    require_writable(output / PICTURE, output / PAGE)
    loaded = RamNetForCausalLM.from_pretrained(model)
    if not ids:
        try:
            check_of_bytes(loaded.config, model)
        except ValueError as error:
            raise ValueError(f"{error}; give --ids for token ids") from None
    with ops.using(kernels):
        traced = record(loaded, torch.tensor([numbers]))
    found = heads_of(traced, layers=layers, heads=heads)
    labels = [str(number) for number in numbers] if ids else byte_labels(bytes(numbers))
    # The picture stays in its temporary file until the page is written, so that a full disk leaves both old files.
    with written_aside(output / PICTURE) as aside:
        picture.save_picture(found, labels, aside)
        page.save_page(found, labels, output / PAGE, whole=ids)
    screen = console()
    screen.print(_table(found))
    if len(found) > picture.MOST_HEADS:
        screen.print(
            f"{PICTURE} shows the first {picture.MOST_HEADS} of {len(found)} heads; choose others by --layer and --head"
        )
    if (tokens := page.tokens_in_page(found)) < len(labels):
        screen.print(
            f"{PAGE} shows the first {tokens} of {len(labels)} tokens; choose fewer heads by --layer and --head"
        )
    click.echo(f"wrote {click.format_filename(output)}: {PICTURE}, {PAGE}")


def _numbers(text: str) -> list[int]:
    """Return the token ids in ``text``. Raises UsageError if one is not an integer of 64 bits."""
    for word in text.split():
        if not word.removeprefix("-").isdecimal() or len(word) > 18:
            raise click.UsageError(
                f"{word[:40]!r} is not a token id; with --ids, TEXT holds integers separated by spaces"
            )
    return [int(word) for word in text.split()]


def byte_labels(data: bytes) -> list[str]:
    """Return what to show for each byte: the character that it completes, or \\x and its hexadecimal digits."""
    decoder = codecs.getincrementaldecoder("utf-8")(errors="replace")
    labels = []
    for number in data:
        character = decoder.decode(bytes([number]))
        plain = len(character) == 1 and (character.isprintable() or character in "\n\t") and character != "\ufffd"
        labels.append(character if plain else f"\\x{number:02x}")
    return labels


def _table(heads: Sequence[HeadTrace]) -> Table:
    from rich.table import Table

    table = Table(title="What each head writes and reads")
    table.add_column("head")
    table.add_column("addresses")
    for column in ("slots written", "half of it", "read from the text"):
        table.add_column(column, justify="right")
    table.add_column("age of what is read")
    for head in heads:
        table.add_row(
            head.name, "move (CAPE)" if head.moves else "stay", f"{head.share_used:.0%} of {len(head.written)}",
            f"in {head.busiest} slots", f"{float(head.ages.sum()):.0%}", head.age(),
        )  # fmt: skip
    return table
