"""Builds the library of custom operators that an export with ``kernels=True`` runs in onnxruntime."""

from __future__ import annotations

import shutil
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from lowering.cpu import runtime
from ramnet.config import RamNetConfig

if TYPE_CHECKING:
    from lowering.aot.ops import Ops

_SOURCES = Path(__file__).parent
_FLAGS = ("-std=c11", "-O3", "-fPIC", "-shared", "-fvisibility=hidden")


def build(config: RamNetConfig, library: Path, target: str = "cpu") -> None:
    """Write the library of a model's memory ops, with the schedules of the records.

    Args:
        target: "cpu" for this machine's processor, or a key of ``lowering.aot.machines.TARGETS`` of its architecture.

    Raises:
        ValueError: if the target is unknown or of another architecture, or the model has too large addresses.
        ImportError: if TVM is not installed.
        RuntimeError: if there is no C compiler, or it fails.
        OSError: if the library cannot be written.
    """
    runtime.match_threads()  # raises the ImportError
    from lowering.aot import weights
    from lowering.aot.build import OWN_NAMES, RUNTIME, SIZES, compiler, parts, run, runs_here, write_kernels
    from lowering.aot.machines import TARGETS, host
    from lowering.aot.ops import Ops, module

    weights.check(config, "float32")
    command = compiler()  # raises the RuntimeError before kernels are compiled
    known = {name: machines for name, machines in TARGETS.items() if runs_here(machines)}
    if target != "cpu" and target not in known:
        raise ValueError(f"target is {target!r}; a library can be built here for {', '.join(['cpu', *known])}")
    machines = known.get(target) or [host()]
    ops = {machine: [Ops(kind, machine, i) for i, kind in enumerate(config.kinds)] for machine in machines}
    # LLVM and compilers may crash on a full disk, so the library is copied to where it belongs.
    with tempfile.TemporaryDirectory(prefix="ramnet-") as temporary:
        folder = Path(temporary)
        names = write_kernels(folder, {machine: module(of_kinds) for machine, of_kinds in ops.items()})
        (folder / SIZES).write_text(_sizes(config, next(iter(ops.values()))) + names, encoding="utf-8")
        sources = [_SOURCES / name for name in ("nodes.c", "ort.h")]
        sources += [RUNTIME / name for name in ("cpu.c", "kernels.c", "kernels.h", "ramnet.h")]
        for path in sources:
            shutil.copy(path, folder / path.name)
        run(*command, *_FLAGS, OWN_NAMES, "-o", folder / "library.so", *parts(folder))
        shutil.copyfile(folder / "library.so", library)


def _sizes(config: RamNetConfig, ops: Sequence[Ops]) -> str:
    """Return config.h: what the C files are compiled with."""
    from lowering.aot.build import kinds_macro, table_macro

    table = []
    for of_kind, c in zip(ops, config.kinds, strict=True):
        address, rows, values = c.order * c.sub_dim, 2 * c.num_heads, c.num_heads * c.value_dim
        table.append((
            of_kind.index, c.num_heads, c.value_dim, c.order, c.sub_dim, c.top_k, c.slots, max(256, of_kind.lanes),
            of_kind.scratch, address, rows, rows * c.top_k, rows * address + values,
        ))  # fmt: skip
    sizes = {
        "KIND_COUNT": len(table), "KIND_TABLE": table_macro(table), "DECAY_POWER": f"{config.decay_power!r}f",
        "EPS": f"{config.eps!r}f",
    }  # fmt: skip
    return kinds_macro(len(table)) + "".join(f"#define {name} {size}\n" for name, size in sizes.items())
