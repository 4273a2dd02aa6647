"""What commands print in any locale."""

from __future__ import annotations

import os
import subprocess
import sys

COMMAND = """
import click
from ramnet.cli import main
from ramnet.console import console

@click.command()
def greek():
    console().print("RAM-Net γ=0")
    click.echo("λ")

main(greek)
"""


def test_a_character_that_the_locale_does_not_have_is_printed_by_its_number() -> None:
    environment = os.environ | {"PYTHONIOENCODING": "latin-1"}
    done = subprocess.run([sys.executable, "-c", COMMAND], capture_output=True, env=environment)
    assert (done.returncode, done.stdout, done.stderr) == (0, b"RAM-Net \\u03b3=0\n\\u03bb\n", b"")
