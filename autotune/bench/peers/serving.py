"""Calls of functions in another process, which has its own interpreter, packages and threads.

A call is a line of JSON, and so is its reply. This module imports only the standard library.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Callable, Mapping
from pathlib import Path
from types import TracebackType
from typing import Any, Self

_ROOT = Path(__file__).resolve().parents[3]
# The folder of this package comes last, so that the interpreter's own packages are imported.
_START = f"import runpy, sys; sys.path.append({str(_ROOT)!r}); runpy.run_module(sys.argv[1], run_name='__main__')"


class PeerError(RuntimeError):
    """A call failed, or the process ended."""


class Peer:
    """A process that runs ``module``, which calls ``serve``, in the interpreter ``python``."""

    def __init__(self, python: str, module: str) -> None:
        self._module = module
        self._errors = tempfile.TemporaryFile()  # noqa: SIM115 closed by __exit__; a pipe that nobody reads would fill up
        self._process = subprocess.Popen(
            [python, "-c", _START, module],
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=self._errors, text=True,
        )  # fmt: skip

    def call(self, name: str, **arguments: Any) -> Any:
        """Return what the function returns. Raises PeerError with its message, or the process's last line."""
        assert self._process.stdin is not None and self._process.stdout is not None
        try:
            self._process.stdin.write(json.dumps([name, arguments]) + "\n")
            self._process.stdin.flush()
            line = self._process.stdout.readline()
        except BrokenPipeError:
            line = ""
        if not line:
            raise PeerError(f"{self._module} ended with status {self._process.wait()}: {self._last_line()}")
        reply = json.loads(line)
        if "error" in reply:
            raise PeerError(reply["error"])
        return reply["value"]

    def _last_line(self) -> str:
        self._errors.seek(0)
        lines = self._errors.read().decode(errors="replace").strip().splitlines()
        return lines[-1] if lines else "it said nothing"

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self._process.kill()
        self._process.communicate()
        self._errors.close()


def serve(functions: Mapping[str, Callable[..., Any]]) -> None:
    """Answer calls until the input ends."""
    replies = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # what libraries print is no reply
    for line in sys.stdin:
        name, arguments = json.loads(line)
        try:
            reply = {"value": functions[name](**arguments)}
        except Exception as error:  # noqa: BLE001 the caller raises it
            reply = {"error": f"{type(error).__name__}: {error}"}
        replies.write(json.dumps(reply) + "\n")
        replies.flush()
