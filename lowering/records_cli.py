"""``ramnet records``: shows and manages records of tuned schedules."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, get_args

import click

from schedules.workload import Op

if TYPE_CHECKING:
    from rich.table import Table

    from schedules.records import Record


def _filters(command: Callable[..., None]) -> Callable[..., None]:
    """Add the options that select records."""
    for option in (
        click.option("--device", help="Only records of this device, as `ramnet records show` prints it."),
        click.option("--op", type=click.Choice(get_args(Op)), help="Only records of this op."),
        click.option("--target", help="Only records of this target; `ramnet targets` lists them."),
    ):
        command = option(command)
    return command


@click.group()
def records() -> None:
    """Show, export, import and remove records of tuned schedules.

    Tuning writes records to the user's data folder, or to the folder that RAMNET_RECORDS names. The records shipped
    with the package are read-only.
    """


@records.command()
@_filters
def show(target: str | None, op: str | None, device: str | None) -> None:
    """Print the records that kernels use, including shipped ones.

    A record is stale if its kernel's code or compiler version has changed since. Its knobs are still used, but its
    times do not apply to the changed kernel and are not shown.
    """
    from ramnet.console import console
    from schedules.records import known, load, records_path

    screen, found = console(), 0
    for name in _targets(target):
        rows = [record for record in known(name) if _is_meant(record, op, device)]
        mine = {record.key for record in load(records_path(name))}
        found += len(rows)
        if rows:
            screen.print(_table(f"records of {name}", rows, mine))
    if not found:
        screen.print("no records")


@records.command()
@click.argument("file", type=click.Path(dir_okay=False, path_type=Path))
@click.option("--shipped", is_flag=True, help="Include the shipped records.")
@_filters
def export(file: Path, shipped: bool, target: str | None, op: str | None, device: str | None) -> None:
    """Write the user's records to FILE, one per line, for `ramnet records import` on another machine."""
    from ramnet.files import require_writable
    from schedules.records import known, load, records_path, save

    require_writable(file)
    found = [
        record
        for name in _targets(target)
        for record in (known(name) if shipped else load(records_path(name)))
        if _is_meant(record, op, device)
    ]
    save(file, found)
    click.echo(f"{_count(found)} in {file}")


@records.command("import")
@click.argument("files", nargs=-1, required=True, type=click.Path(exists=True, dir_okay=False, path_type=Path))
@click.option("--replace", is_flag=True, help="Replace existing records, too, although they were not compared.")
def import_(files: tuple[Path, ...], replace: bool) -> None:
    """Add the records in FILES to the user's records, except those of a workload and device that already have one."""
    from lowering.targets import find
    from ramnet.files import require_writable
    from schedules.records import load, merge, records_path

    by_target: dict[str, list[Record]] = {}
    for file in files:
        for record in load(file):
            by_target.setdefault(find(record.target).name, []).append(record)
    require_writable(*map(records_path, by_target))
    for target, found in sorted(by_target.items()):
        left_out = merge(records_path(target), found, None if replace else ())
        added = len(found) - len(left_out)
        why = f"; {_count(left_out)} left out: known already, see --replace" if left_out else ""
        click.echo(f"{target}: {added} of {_count(found)} in {records_path(target)}{why}")


@records.command()
@click.option("--stale", "only_stale", is_flag=True, help="Only stale records.")
@_filters
def prune(only_stale: bool, target: str | None, op: str | None, device: str | None) -> None:
    """Remove and print the user's records that match all given options."""
    from lowering.fingerprint import stale
    from ramnet.console import console
    from schedules.records import records_path, remove

    if not (only_stale or target or op or device):
        raise click.UsageError("say which records to remove: --stale, --target, --op or --device")

    def is_meant(record: Record) -> bool:
        return _is_meant(record, op, device) and (not only_stale or stale(record) is not None)

    screen, removed = console(), 0
    for name in _targets(target):
        rows = remove(records_path(name), is_meant)
        removed += len(rows)
        if rows:
            screen.print(_table(f"removed from {records_path(name)}", rows, {record.key for record in rows}))
    screen.print(f"{removed} removed")


def _targets(given: str | None) -> Sequence[str]:
    from lowering.targets import TARGETS, find

    return [find(given).name] if given else list(TARGETS)


def _is_meant(record: Record, op: str | None, device: str | None) -> bool:
    return op in (None, record.workload.op) and device in (None, record.device)


def _count(found: Sequence[Any]) -> str:
    return f"{len(found)} record{'s'[: len(found) != 1]}"


def _table(title: str, rows: Sequence[Record], mine: set[tuple[str, str]]) -> Table:
    from rich.table import Table

    from lowering.fingerprint import stale
    from ramnet.console import duration
    from schedules.kinds import default_schedule

    table = Table(title=title, title_justify="left", title_style="bold")
    for column in ("workload", "device", "how", "time", "gain", "knobs", "whose", "date"):
        table.add_column(column, no_wrap=column == "date", overflow="fold")
    for record in rows:
        why, schedule = stale(record), record.schedule()
        is_default = schedule == default_schedule(record.workload, record.target)
        op, _, sizes = record.workload.name.partition(" ")
        table.add_row(
            f"{op}\n  {sizes}", record.device, record.how if why is None else f"stale: {why}",
            "" if why else duration(record.tuned.median),
            "" if why else "no gain" if is_default else f"{record.gain:.2f}×",
            str(schedule), "yours" if record.key in mine else "shipped", record.date,
        )  # fmt: skip
    return table
