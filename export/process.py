"""Verifies an export in a process of its own, which a faulty library may crash."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path


def check(directory: Path) -> float:
    """Return the error that ``export.check`` finds. Raises ValueError if the check fails or the process crashes."""
    command = [sys.executable, "-m", "export.check", str(directory)]
    done = subprocess.run(command, env=environment(), capture_output=True, text=True)
    if done.returncode < 0:
        raise ValueError(f"the exported model crashed when it was verified, by signal {-done.returncode}")
    if done.returncode:
        raise ValueError((done.stderr.strip() or "the check failed").splitlines()[-1].split(": ", 1)[-1])
    return float(json.loads(done.stdout))


def environment() -> dict[str, str]:
    """Return the environment in which ``python -m`` finds these packages, and none of their names in its folder."""
    here = str(Path(__file__).parents[1])
    path = os.pathsep.join([here, *filter(None, [os.environ.get("PYTHONPATH")])])
    return {**os.environ, "PYTHONSAFEPATH": "1", "PYTHONPATH": path}
