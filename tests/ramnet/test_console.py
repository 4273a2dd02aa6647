"""What commands print in any locale."""

from __future__ import annotations

import os
import subprocess
import sys


def test_a_character_that_the_locale_does_not_have_is_printed_by_its_number() -> None:
    program = "from ramnet.console import console; console().print('RAM-Net γ=0'); console(stderr=True).print('γ')"
    environment = os.environ | {"PYTHONIOENCODING": "ascii:strict"}
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, env=environment)
    assert (done.returncode, done.stdout, done.stderr) == (0, b"RAM-Net \\u03b3=0\n", b"\\u03b3\n")
