"""Builds the library of custom operators that an export with ``kernels=True`` runs in onnxruntime."""

from __future__ import annotations

import platform
import shutil
import subprocess
import tempfile
from pathlib import Path

from lowering.cpu import runtime
from lowering.targets import cpu_features
from ramnet.config import RamNetConfig

_SOURCES = Path(__file__).parent
_FLAGS = ("-std=c11", "-O3", "-fPIC", "-shared", "-fvisibility=hidden")

# What LLVM may use of an x86 processor: C compilers' names, with the system's where they differ.
_AVX2 = ("avx2", "bmi2", "fma")
_AVX512 = ("avx512f", "avx512bw", "avx512cd", "avx512dq", "avx512vl")
_LATER = ("avx512vbmi", "avx512ifma", "avx512_vbmi2", "avx512_bitalg", "avx512_vpopcntdq", "avx512_vnni")


def build(config: RamNetConfig, library: Path, target: str = "cpu") -> None:
    """Write the library of a model's memory ops, with the schedules of the records.

    Args:
        target: "cpu" for this machine's processor, or a key of ``lowering.aot.machines.MACHINES`` of its architecture.

    Raises:
        ValueError: if the target is unknown or of another architecture, or the model has too large addresses.
        ImportError: if TVM is not installed.
        RuntimeError: if there is no C compiler, or it fails.
        OSError: if the library cannot be written.
    """
    runtime.match_threads()  # raises the ImportError
    from lowering.aot import weights
    from lowering.aot.build import KERNELS, RUNTIME, SIZES, compiled, compiler
    from lowering.aot.machines import MACHINES, host
    from lowering.aot.ops import Ops

    weights.check(config, "float32")
    command = compiler()  # raises the RuntimeError before kernels are compiled
    known = {name: machine for name, machine in MACHINES.items() if platform.machine() in machine.llvm["mtriple"]}
    if target != "cpu" and target not in known:
        raise ValueError(f"target is {target!r}; a library can be built here for {', '.join(['cpu', *known])}")
    ops = Ops(config, known.get(target) or host())
    # LLVM and compilers may crash on a full disk, so the library is copied to where it belongs.
    with tempfile.TemporaryDirectory(prefix="ramnet-") as temporary:
        folder = Path(temporary)
        (folder / KERNELS).write_bytes(compiled(ops.module(), ops.machine))
        (folder / SIZES).write_text(_sizes(config, target, ops.lanes, ops.scratch), encoding="utf-8")
        sources = [_SOURCES / name for name in ("nodes.c", "ort.h")]
        sources += [RUNTIME / name for name in ("kernels.c", "kernels.h", "ramnet.h")]
        for path in sources:
            shutil.copy(path, folder / path.name)
        parts = ("nodes.c", "kernels.c", KERNELS)
        line = [command, *_FLAGS, "-o", "library.so", *parts]
        done = subprocess.run(line, cwd=folder, capture_output=True, text=True)
        if done.returncode:
            raise RuntimeError(f"{command} failed: {done.stderr.strip() or done.returncode}")
        shutil.copyfile(folder / "library.so", library)


def _sizes(config: RamNetConfig, target: str, lanes: int, scratch: int) -> str:
    """Return config.h: what the C files are compiled with."""
    c = config
    sizes = {
        "HEADS": c.num_heads, "ORDER": c.order, "SUB_DIM": c.sub_dim, "TOP_K": c.top_k, "SLOTS": c.slots,
        "VALUE_DIM": c.value_dim, "MANY_ROWS": max(256, lanes), "SCRATCH": scratch,
        "DECAY_POWER": f"{c.decay_power!r}f", "EPS": f"{c.eps!r}f",
    }  # fmt: skip
    needed = " ".join(f"X({feature})" for feature in _required(target))
    return "".join(f"#define {name} {size}\n" for name, size in sizes.items()) + f"#define REQUIRED_FEATURES {needed}\n"


def _required(target: str) -> list[str]:
    """Return the features that the library checks for when it is loaded, by the names of ``__builtin_cpu_supports``."""
    if platform.machine() != "x86_64":
        return []
    levels = {"x86-64-v3": _AVX2, "x86-64-v4": (*_AVX2, *_AVX512)}
    return [name.replace("_", "") for name in levels.get(target, ()) or _here()]


def _here() -> list[str]:
    return [name for name in (*_AVX2, *_AVX512, *_LATER) if name in cpu_features()]
