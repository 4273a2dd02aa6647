"""The ``ramnet`` command. Each package contributes its verbs through the entry points ``ramnet.commands``."""

from __future__ import annotations

import os
import signal
import sys
from pathlib import Path

import click

from ramnet import __version__
from ramnet.plugins import docstring, load, plugins

_HERE = str(Path(__file__).parents[1])


class _Commands(click.Group):
    """A group whose commands are the installed entry points, imported when they are asked for."""

    def list_commands(self, ctx: click.Context) -> list[str]:
        return sorted(plugins("ramnet.commands"))

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        entry = plugins("ramnet.commands").get(cmd_name)
        return None if entry is None else load(entry)

    def format_commands(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        # Loading the verbs for their help would import torch: 2.0 s of processor time, where reading it takes 0.2.
        verbs = (click.Command(name, help=docstring(entry)) for name, entry in plugins("ramnet.commands").items())
        click.Group(commands=sorted(verbs, key=lambda verb: str(verb.name))).format_commands(ctx, formatter)


@click.group(cls=_Commands, context_settings={"help_option_names": ["-h", "--help"], "show_default": True})
@click.version_option(__version__)
def ramnet() -> None:
    """RAM-Net: train it, tune its kernels for a machine, compare them, export it."""


def main(command: click.Command = ramnet) -> None:
    """Run a command line; a failure is one line on stderr and an exit status other than 0."""
    # Processes that a verb starts do not look for modules in the current folder either.
    os.environ["PYTHONSAFEPATH"] = "1"
    os.environ["PYTHONPATH"] = os.pathsep.join([_HERE, *filter(None, [os.environ.get("PYTHONPATH")])])
    if "OMP_WAIT_POLICY" not in os.environ:
        # After each of its ops torch's threads spin for milliseconds on cores that the kernels' threads want. With both
        # cores busy elsewhere a training step took 415 ms so and 147 ms with short spins; on idle cores, 56 to 78 ms
        # either way. OpenMP reads this once, when torch is imported, so that it can be set neither where kernels are
        # loaded nor by a package that is imported after torch.
        os.environ.setdefault("GOMP_SPINCOUNT", "10000")
    # A plain `kill` unwinds like Ctrl-C, so that files written aside are removed and children stopped.
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
    try:
        command.main(standalone_mode=False)
    except click.exceptions.Exit as stop:
        sys.exit(stop.exit_code)
    except click.ClickException as error:
        error.show()
        sys.exit(error.exit_code)
    except (click.Abort, KeyboardInterrupt):
        click.echo("ramnet: interrupted", err=True)
        sys.exit(130)
    except (ValueError, TypeError, OSError, RuntimeError, ImportError, MemoryError) as error:
        click.echo(f"ramnet: {_sentence(error)}", err=True)
        sys.exit(1)


def _sentence(error: Exception) -> str:
    """What an error says, in one line."""
    from pydantic import ValidationError

    from ramnet.config import one_line

    text = one_line(error) if isinstance(error, ValidationError) else str(error)
    return " ".join(text.split()) or type(error).__name__


if __name__ == "__main__":
    if not sys.flags.safe_path:
        sys.path[0] = _HERE  # in place of the current folder, where files of the user's could hide packages
    main()
