"""Builds a model's library as one WebAssembly module, which imports nothing."""

from __future__ import annotations

import re
import shutil
import subprocess
import tempfile
from pathlib import Path

from lowering.aot import build
from lowering.aot.machines import WASM
from ramnet.config import RamNetConfig
from ramnet.files import written_aside

_INSTALL = "with Debian's packages, apt-get install clang lld wasi-libc"
_COMPILE = ("--target=wasm32-wasi", "-std=c11", "-O2", "-msimd128", "-mbulk-memory", "-fvisibility=hidden")
# The stack lies below everything else, so that an overflow is a trap instead of damage. Messages print no floating
# numbers, whose printing would need a library of long double arithmetic.
_LINK = (
    "-nostartfiles", "-nodefaultlibs", "-Wl,--no-entry,--strip-all,--stack-first,-z,stack-size=262144",
    "-lc-printscan-no-floating-point", "-lc",
)  # fmt: skip


def write_wasm(config: RamNetConfig, precision: str, path: str | Path) -> None:
    """Write the library of a model to ``path``. It exports the functions of ``ramnet.h``, malloc, free and memory.

    Args:
        precision: the type of the weight matrices, a key of ``lowering.aot.weights.FILE_TYPES``.

    Raises:
        ValueError: if ``weights.check`` refuses the config or the precision.
        ImportError: if TVM is not installed.
        RuntimeError: if clang, wasm-ld or wasi-libc is missing, or fails.
        OSError: if the file cannot be written.
    """
    clang = compiler()
    with tempfile.TemporaryDirectory(prefix="ramnet-") as name, written_aside(path) as aside:
        folder = Path(name)
        build.write_sources(config, folder, precision, [WASM])
        interface = (folder / "ramnet.h").read_text(encoding="utf-8")
        names = ["malloc", "free", *re.findall(r"RAMNET_API [^(;]*?(ramnet_\w+)\(", interface)]
        exports = [f"-Wl,--export-if-defined={each}" for each in names]
        linked = folder / "ramnet.wasm"
        build.run(clang, *_COMPILE, *exports, "-o", linked, *build.parts(folder), *_LINK)
        aside.write_bytes(linked.read_bytes())  # a linker makes programs, which are executable


def compiler() -> str:
    """Return clang. Raises RuntimeError if it, its linker or its C library for WebAssembly is missing."""
    for program in ("clang", "wasm-ld"):
        if shutil.which(program) is None:
            raise RuntimeError(f"{program} is not installed, which compiles WebAssembly; {_INSTALL}")
    found = subprocess.run(
        ["clang", "--target=wasm32-wasi", "-print-file-name=libc.a"], capture_output=True, text=True, check=False
    )
    if not Path(found.stdout.strip()).is_absolute():
        raise RuntimeError(f"clang has no C library for WebAssembly; {_INSTALL}")
    return "clang"
