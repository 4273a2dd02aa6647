"""Finds nvcc and compiles CUDA C with it."""

from __future__ import annotations

import importlib.util
import os
import re
import shutil
import subprocess
import tempfile
from functools import cache
from pathlib import Path

MISSING = "nvcc, which compiles TIR's kernels, is not installed: pip install nvidia-cuda-nvcc nvidia-cuda-cccl"


class NoNvccError(ValueError):
    """nvcc is not installed, so that CUDA C can be generated but not compiled."""

    status = "no_compiler"


# nvcc fuses multiply-adds by default. Denormals are flushed to zero, which saves three instructions per division. No
# other fast math is enabled.
FLAGS = ("-w", "-ftz=true")


def compile_cuda(text: str, arch: str) -> tuple[bytes, str]:
    """Compile CUDA C for ``arch``. Returns the cubin and the output of ptxas.

    Raises NoNvccError if nvcc is not installed, and RuntimeError, with nvcc's message, if it fails.
    """
    return _compile(text, arch, "-cubin", "-Xptxas", "-v")


def ptx(text: str, arch: str) -> str:
    """Compile CUDA C to PTX; raises as ``compile_cuda`` does."""
    return _compile(text, arch, "-ptx")[0].decode()


def _compile(text: str, arch: str, *flags: str) -> tuple[bytes, str]:
    program = nvcc()
    if program is None:
        raise NoNvccError(MISSING)
    with tempfile.TemporaryDirectory() as folder:
        source, made = Path(folder) / "kernel.cu", Path(folder) / "kernel.made"
        source.write_text(text, encoding="utf-8")
        command = [program, *FLAGS, f"-arch={arch}", *flags, "-o", str(made), str(source)]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        if done.returncode:
            raise RuntimeError(f"nvcc failed for {arch}: {done.stderr.strip()}")
        return made.read_bytes(), done.stdout + done.stderr


@cache
def nvcc() -> str | None:
    """Return the path of nvcc from PATH, CUDA_HOME or the package nvidia-cuda-nvcc; None if there is none."""
    found = shutil.which("nvcc")
    if found:
        return found
    folders = [Path(os.environ["CUDA_HOME"])] if os.environ.get("CUDA_HOME") else []
    package = importlib.util.find_spec("nvidia")
    for place in package.submodule_search_locations or [] if package else []:
        folders += sorted(Path(place).glob("cu[0-9]*"), reverse=True)
    return next((str(folder / "bin" / "nvcc") for folder in folders if (folder / "bin" / "nvcc").is_file()), None)


@cache
def version() -> str | None:
    """Return the version of nvcc, such as "13.0.88", or None if it is not known."""
    program = nvcc()
    if program is None:
        return None
    try:
        printed = subprocess.run([program, "--version"], capture_output=True, text=True, check=False).stdout
    except OSError:
        return None
    found = re.search(r"\bV(\d+(?:\.\d+)*)", printed)
    return found[1] if found else None
