"""Small C++ helpers of the measurements, built once for this machine with the compiler found there."""

from __future__ import annotations

import ctypes
import hashlib
import os
import shutil
import subprocess
from pathlib import Path

from ramnet.files import written_aside

FLAGS = ("-std=c++17", "-O3", "-march=native", "-fPIC", "-shared", "-pthread")


class NoCompilerError(RuntimeError):
    """There is no C++ compiler, or it fails."""


def load(name: str, source: str) -> ctypes.CDLL:
    """Build the C++ ``source`` as a shared library and load it; it is cached by compiler and CPU.

    Raises NoCompilerError, in one sentence, on failure.
    """
    compiler = shutil.which(os.environ.get("CXX", "g++")) or shutil.which("clang++")
    if compiler is None:
        raise NoCompilerError("no C++ compiler was found; install g++ or clang++, or name one in CXX")
    # The macros say the compiler's version and what -march=native means here.
    macros = _run([compiler, *FLAGS, "-dM", "-E", "-x", "c++", os.devnull])
    key = hashlib.sha256("\0".join([source, macros, *FLAGS]).encode()).hexdigest()[:16]
    library = _cache_directory() / f"{name}-{key}.so"
    if not library.exists():
        with written_aside(library) as aside:
            _run([compiler, *FLAGS, "-x", "c++", "-", "-o", str(aside)], source)
    return ctypes.CDLL(str(library))


def _cache_directory() -> Path:
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "ramnet" / "native"


def _run(command: list[str], text: str = "") -> str:
    done = subprocess.run(command, input=text, capture_output=True, text=True, check=False, timeout=120)
    if done.returncode:
        lines = done.stderr.strip().splitlines() or [f"status {done.returncode}"]
        raise NoCompilerError(f"{command[0]} failed: {lines[0]}")
    return done.stdout
