"""Small C++ helpers of the measurements, built once for this machine with the compiler found there."""

from __future__ import annotations

import ctypes
import hashlib
import os
import shutil
import subprocess
import tempfile
from pathlib import Path

from lowering import cache
from lowering.compilers import cxx

FLAGS = ("-std=c++17", "-O3", "-march=native", "-fPIC", "-shared", "-pthread")


class NoCompilerError(RuntimeError):
    """There is no C++ compiler, or it fails."""


def load(name: str, source: str) -> ctypes.CDLL:
    """Build the C++ ``source`` as a shared library and load it; it is kept beside the kernels, by compiler and CPU.

    Raises NoCompilerError, in one sentence, on failure.
    """
    compiler = cxx("g++", "clang++")
    if compiler is None:
        raise NoCompilerError("no C++ compiler was found; install g++ or clang++, or name one in CXX")
    # The macros say the compiler's version and what -march=native means here; CXX may have other options.
    macros = _run([*compiler, *FLAGS, "-dM", "-E", "-x", "c++", os.devnull])
    key = hashlib.sha256("\0".join([source, macros, *FLAGS, *compiler[1:]]).encode()).hexdigest()[:16]
    file = f"{name}-{key}.so"
    known = cache.find(file)
    if known is not None:
        return ctypes.CDLL(str(known))
    with tempfile.TemporaryDirectory() as folder:
        built = Path(folder) / file
        _run([*compiler, *FLAGS, "-x", "c++", "-", "-o", str(built)], source)
        kept = cache.keep(file, lambda path: shutil.copyfile(built, path))
        return ctypes.CDLL(str(kept or built))


def _run(command: list[str], text: str = "") -> str:
    try:
        done = subprocess.run(command, input=text, capture_output=True, text=True, check=False, timeout=120)
    except (OSError, subprocess.TimeoutExpired) as error:
        raise NoCompilerError(f"{command[0]} failed: {error}") from None
    if done.returncode:
        lines = done.stderr.strip().splitlines() or [f"status {done.returncode}"]
        raise NoCompilerError(f"{command[0]} failed: {lines[0]}")
    return done.stdout
