"""The ``ramnet`` command. Each package adds its subcommands through the entry points ``ramnet.commands``."""

from __future__ import annotations

import os
import signal
import sys
from io import TextIOWrapper
from pathlib import Path

import click

from ramnet import __version__
from ramnet.plugins import docstring, load, plugins

_HERE = str(Path(__file__).parents[1])


class _Commands(click.Group):
    """A group whose commands are the installed entry points, each imported when it is called."""

    def list_commands(self, ctx: click.Context) -> list[str]:
        return sorted(plugins("ramnet.commands"))

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        entry = plugins("ramnet.commands").get(cmd_name)
        return None if entry is None else load(entry)

    def format_commands(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        # Importing the subcommands for their help would import torch: 2.0 s of CPU time, against 0.2 s for reading
        # their source.
        commands = (click.Command(name, help=docstring(entry)) for name, entry in plugins("ramnet.commands").items())
        click.Group(commands=sorted(commands, key=lambda each: str(each.name))).format_commands(ctx, formatter)


@click.group(cls=_Commands, context_settings={"help_option_names": ["-h", "--help"], "show_default": True})
@click.version_option(__version__)
def ramnet() -> None:
    """RAM-Net: train it, tune its kernels for a machine, compare them, export it."""


def main(command: click.Command = ramnet) -> None:
    """Run the command line. A failure prints one line on stderr and exits with a non-zero status."""
    # Child processes must not import modules from the current folder either.
    os.environ["PYTHONSAFEPATH"] = "1"
    os.environ["PYTHONPATH"] = os.pathsep.join([_HERE, *filter(None, [os.environ.get("PYTHONPATH")])])
    if "OMP_WAIT_POLICY" not in os.environ:
        # By default, torch's OpenMP threads spin for milliseconds after each op, on cores that the kernels' threads
        # need. With both cores busy elsewhere, a training step took 415 ms with the default and 147 ms with short
        # spins; on idle cores, 56 to 78 ms either way. OpenMP reads the variable once, when torch is imported, so it
        # must be set before that.
        os.environ.setdefault("GOMP_SPINCOUNT", "10000")
    if isinstance(sys.stdout, TextIOWrapper) and sys.stdout.errors == "strict":
        # Prints a character that the locale does not have by its number, as Python does on stderr, instead of failing.
        sys.stdout.reconfigure(errors="backslashreplace")
    # SIGTERM unwinds the stack as Ctrl-C does, so that temporary files are removed and child processes stopped.
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
    try:
        command.main(standalone_mode=False)
    except click.exceptions.Exit as stop:
        sys.exit(stop.exit_code)
    except click.ClickException as error:
        error.show()
        sys.exit(error.exit_code)
    except (click.Abort, KeyboardInterrupt) as stop:
        if isinstance(stop.__cause__, EOFError):  # of which click, too, makes an Abort
            click.echo(f"ramnet: {_sentence(stop.__cause__)}", err=True)
            sys.exit(1)
        click.echo("ramnet: interrupted", err=True)
        sys.exit(130)
    except (ValueError, TypeError, OSError, RuntimeError, ImportError, MemoryError, OverflowError) as error:
        click.echo(f"ramnet: {_sentence(error)}", err=True)
        sys.exit(1)


def _sentence(error: Exception) -> str:
    """Return the error's message as one line."""
    from pydantic import ValidationError

    from ramnet.config import one_line

    text = one_line(error) if isinstance(error, ValidationError) else str(error)
    return " ".join(text.split()) or type(error).__name__


if __name__ == "__main__":
    if not sys.flags.safe_path:
        sys.path[0] = _HERE  # instead of the current folder, where the user's files could shadow these packages
    main()
