"""Runs a module of the benchmark in a process of its own."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Mapping


def output_of(module: str, *arguments: str, timeout: float, environment: Mapping[str, str] | None = None) -> str:
    """Return what ``python -m module arguments`` prints.

    Raises ValueError if the module ends with one, as a wrong result does, and RuntimeError if it fails otherwise or
    takes longer than ``timeout`` seconds.
    """
    command = [sys.executable, "-m", module, *arguments]
    try:
        done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=timeout, env=environment)
    except subprocess.TimeoutExpired:
        raise RuntimeError(f"{module} was killed after {timeout:g} s") from None
    if done.returncode:
        last = (done.stderr.strip().splitlines() or ["no output"])[-1]
        kind = ValueError if last.startswith("ValueError: ") else RuntimeError
        raise kind(f"{module} failed: {last}")
    return done.stdout
