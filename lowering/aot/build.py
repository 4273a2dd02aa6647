"""Builds the library of a model: TIR's object, the C files in ``runtime/``, and a header of sizes."""

from __future__ import annotations

import hashlib
import os
import platform
import shlex
import shutil
import subprocess
import tempfile
from collections.abc import Iterable, Mapping, Sequence
from functools import cache as once
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from lowering import cache
from lowering.aot import weights
from lowering.aot.machines import WASM, Machine, condition, host
from lowering.aot.schedules import schedules_of
from lowering.cpu import runtime
from lowering.cpu.build import object_in_memory
from lowering.fingerprint import closure, code, package_versions
from lowering.targets import cpu_digest
from ramnet.config import RamNetConfig
from schedules.deployment import digest

if TYPE_CHECKING:
    from schedules.deployment import Deployment

RUNTIME = Path(__file__).parent / "runtime"
SIZES = "config.h"
# WebAssembly has neither files nor threads.
_SYSTEM, _NO_SYSTEM = {"disk.c", "pool.c"}, {"wasm.c"}
_FLAGS = ("-std=c11", "-O2", "-fPIC", "-fvisibility=hidden")
# A program may load the libraries of several models, whose functions and kernels have the same names.
OWN_NAMES = "-Wl,-Bsymbolic"


class Loops(NamedTuple):
    """What does not change results but speed.

    Attributes:
        tiling: of matrix products, ``lowering.aot.matrix.Tiling``; None takes that of the precision.
        spins: how often an idle thread looks for work before it sleeps.
        block: tokens of a prompt that share a read of the weights, ``weights.BLOCK`` to ``weights.LONGEST_BLOCK``.
    """

    tiling: Any = None
    # The gaps between the loops of a token are some microseconds; a thread that slept takes 50 to wake.
    spins: int = 20000
    block: int = weights.BLOCK

    @classmethod
    def of(cls, deployment: Deployment) -> Loops:
        """Return the loops of what ``ramnet tune-model`` found."""
        from lowering.aot.matrix import Tiling

        tiling = Tiling(rows=deployment.rows, tokens=deployment.tokens, lanes=deployment.lanes)
        return cls(tiling, deployment.spins, deployment.block)


LOOPS = Loops()


def shared_library(config: RamNetConfig, precision: str = "float32", loops: Loops = LOOPS) -> Path:
    """Return the shared library of a model for this machine, from the disk cache or built now.

    Args:
        precision: the type of the weight matrices, a key of ``lowering.aot.weights.FILE_TYPES``.
        loops: the loops of its products and its threads' waiting.

    Raises:
        ValueError: if ``weights.check`` refuses the config or the precision.
        ImportError: if TVM is not installed.
        RuntimeError: if there is no C compiler, or it fails.
    """
    name = f"token-{_key(config, precision, loops)}.so"
    found = cache.find(name)
    if found is None:
        compiler()  # raises the RuntimeError before kernels are compiled
        found = cache.keep(name, lambda aside: _build(config, precision, loops, aside))
    if found is None:
        found = Path(_without_cache().name) / name
        if not found.exists():
            _build(config, precision, loops, found)
    return found


@once
def _without_cache() -> tempfile.TemporaryDirectory[str]:
    """Return a folder that is removed when the process ends."""
    return tempfile.TemporaryDirectory(prefix="ramnet-")


def _build(config: RamNetConfig, precision: str, loops: Loops, library: Path) -> None:
    with tempfile.TemporaryDirectory(prefix="ramnet-") as folder:
        write_sources(config, Path(folder), precision, loops=loops)
        link(Path(folder), library)


def write_sources(
    config: RamNetConfig, folder: Path, precision: str = "float32", machines: Sequence[Machine] = (),
    loops: Loops = LOOPS,
) -> None:  # fmt: skip
    """Write what a library is made of to ``folder``: the kernels' objects, their sizes, and the C files.

    Args:
        machines: for which the kernels are compiled, the best first; none is this machine.

    Raises:
        ValueError: if ``weights.check`` refuses the config or the precision.
        ImportError: if TVM is not installed.
        OSError: if a file cannot be written.
    """
    runtime.match_threads()  # raises the ImportError
    from lowering.aot import token

    weights.check(config, precision)
    modules = {each: token.module(config, precision, each, loops.tiling) for each in machines or [host()]}
    names = write_kernels(folder, modules)
    (folder / SIZES).write_text(_sizes(config, precision, loops) + names, encoding="utf-8")
    for path in RUNTIME.iterdir():
        if path.name not in (_SYSTEM if WASM in modules else _NO_SYSTEM):
            shutil.copy(path, folder / path.name)


def write_kernels(folder: Path, modules: Mapping[Machine, Any]) -> str:
    """Write an object of the functions of each machine, and return the macros by which ``cpu.c`` knows them."""
    from lowering.aot.function import prefix

    sets = []
    for machine, module in modules.items():
        (folder / f"{machine.symbol}.o").write_bytes(compiled(module, machine))
        needs = " ".join(f'NEEDS("{feature}", {condition(feature)})' for feature in machine.needs)
        sets.append(f"SET({machine.symbol}, {needs})")
        names = [each.name_hint.removeprefix(prefix(machine)) for each in module.get_global_vars()]
    kernels = " ".join(f"KERNEL(set, {name})" for name in names)
    return f"#define KERNELS(KERNEL, set) {kernels}\n#define SETS {' '.join(sets)}\n"


def compiled(module: Any, machine: Machine) -> bytes:
    """Compile functions of ``lowering.aot.function`` to an object file."""
    import tvm

    # StorageRewrite merges small buffers into large ones, which need TVM's allocator.
    with tvm.transform.PassContext(config={"tirx.disable_storage_rewrite": True}):
        executable: Any = tvm.compile(module, target=tvm.target.Target(machine.llvm))
    with object_in_memory(executable) as place:
        kernels = Path(place).read_bytes()
    if b"__TVMBackendAllocWorkspace" in kernels:
        raise RuntimeError("a kernel needs a workspace, which the C library does not have")
    return kernels


def write_libraries(
    config: RamNetConfig, precision: str, machines: Sequence[Machine], directory: Path, loops: Loops = LOOPS
) -> None:
    """Write libramnet.so, libramnet.a and ramnet.h to ``directory``. Raises what ``write_sources`` and ``link`` do."""
    with tempfile.TemporaryDirectory(prefix="ramnet-") as place:
        folder = Path(place)
        write_sources(config, folder, precision, machines, loops)
        link(folder, directory / "libramnet.so", machines)
        archive(folder, directory / "libramnet.a", machines)
        shutil.copy(folder / "ramnet.h", directory / "ramnet.h")


def parts(folder: Path) -> list[Path]:
    """Return the C files and the kernels that ``write_sources`` wrote."""
    return sorted([*folder.glob("*.c"), *folder.glob("*.o")])


def link(folder: Path, library: Path, machines: Sequence[Machine] = ()) -> None:
    """Compile the C files in ``folder`` and link them with the kernels. Raises RuntimeError if that fails."""
    run(*compiler(machines), *_FLAGS, "-shared", OWN_NAMES, "-o", library, *parts(folder), "-lm", "-pthread")


def archive(folder: Path, archive: Path, machines: Sequence[Machine] = ()) -> None:
    """Compile the C files in ``folder`` and pack them with the kernels. Raises RuntimeError if that fails."""
    for source in sorted(folder.glob("*.c")):
        run(*compiler(machines), *_FLAGS, "-c", "-o", folder / f"{source.name}.o", source)
    run(_tool("ar", machines), "rcsD", archive, *sorted(folder.glob("*.o")))


def run(*command: str | Path) -> None:
    """Run a compiler or a linker. Raises RuntimeError, with what it printed, if it fails."""
    done = subprocess.run([str(part) for part in command], capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError(f"{command[0]} failed: {done.stderr.strip() or done.returncode}")


def compiler(machines: Sequence[Machine] = ()) -> list[str]:
    """Return the command of the C compiler for processors of one kind, by default this one.

    It is ``$CC``, or the first of cc, gcc and clang; for another kind of processor, the cross compiler of its triple,
    such as aarch64-linux-gnu-gcc. Raises RuntimeError if there is none, or none of the name in CC.
    """
    if not runs_here(machines):
        return [_tool("gcc", machines)]
    named = shlex.split(os.environ.get("CC", ""))
    path = next(filter(None, map(shutil.which, named[:1] or ("cc", "gcc", "clang"))), None)
    if path is None and named:
        raise RuntimeError(f"CC is {os.environ['CC']!r}, and {named[0]} is not the name or the path of a program")
    if path is None:
        raise RuntimeError("there is no C compiler; install gcc or clang, or name one in CC")
    return [path, *named[1:]]


def _tool(name: str, machines: Sequence[Machine]) -> str:
    """Return the path of a tool of binutils or gcc. Raises RuntimeError if it is not installed."""
    if not runs_here(machines):
        name = f"{machines[0].llvm['mtriple']}-{name}"
    path = shutil.which(name)
    if path is None:
        raise RuntimeError(
            f"{name} is not installed; the library of {machines[0].name if machines else 'a model'} needs it"
        )
    return path


def runs_here(machines: Sequence[Machine]) -> bool:
    """Return whether the libraries of processors are of this system's kind, such as x86-64."""
    return not machines or machines[0].llvm.get("mtriple", platform.machine()).startswith(platform.machine())


def _key(config: RamNetConfig, precision: str, loops: Loops) -> str:
    """Return a digest of everything that determines the library."""
    machine = host()
    chosen = repr([schedules_of(kind, machine) for kind in config.kinds])
    parts = [config.to_json(), precision, repr(loops), cpu_digest(), repr(package_versions("llvm")), chosen, *sources()]
    return hashlib.sha256("\n".join(parts).encode()).hexdigest()[:24]


def sources() -> list[str]:
    """Return the code that libraries are made of."""
    modules = [code(name) for name in sorted(closure(["lowering.aot.token", "lowering.aot.build"]))]
    return [*modules, *(path.read_text(encoding="utf-8") for path in sorted(RUNTIME.iterdir()))]


def _sizes(config: RamNetConfig, precision: str, loops: Loops) -> str:
    """Return config.h: the sizes that the C files are compiled with."""
    c = config
    pointers = list(weights.table(config, precision))

    def of_one(part: str) -> int:
        return sum(name.startswith(f"{part}.0.") for name, *_ in pointers)

    layers = [
        (c.kinds.index(each), each.num_heads, c.cape_heads(i), each.order * each.sub_dim, each.top_k, each.slots,
         each.value_dim)
        for i, each in enumerate(c.layers)
    ]  # fmt: skip
    sizes = {
        "VOCABULARY": c.vocab_size, "HIDDEN": c.hidden_size, "LAYERS": c.num_layers,
        # The most of any layer for a token: addresses, and their logits, accesses and values.
        "ROWS": max(2 * each.num_heads for each in c.kinds),
        "LOGITS": max(2 * each.num_heads * each.order * each.sub_dim for each in c.kinds),
        "ACCESSES": max(2 * each.num_heads * each.top_k for each in c.kinds),
        "VALUES": max(each.num_heads * each.value_dim for each in c.kinds),
        "INNER": c.intermediate_size, "CONVS": c.conv_layers, "TAPS": c.conv_kernel, "WEIGHTS": len(pointers),
        "CONV_WEIGHTS": of_one("convs"), "BLOCK_WEIGHTS": of_one("blocks"), "BLOCK": loops.block,
        "SPINS": loops.spins, "ADDRESS_BIAS": int(c.address_bias is not None), "CONFIG": f'"{digest(c)}"',
    }  # fmt: skip
    defines = "".join(f"#define {name} {size}\n" for name, size in sizes.items())
    rows = ", \\\n".join(_row(*each) for each in pointers)
    tables = f"#define LAYER_TABLE {table_macro(layers)}\n#define WEIGHT_TABLE {{ \\\n{rows}}}\n"
    return defines + kinds_macro(len(c.kinds)) + tables


def kinds_macro(count: int) -> str:
    """Return the macro that lists the kernels of a name, one of each kind of layer."""
    return f"#define KINDS(name) {', '.join(f'name##_{i}' for i in range(count))}\n"


def table_macro(rows: Iterable[Iterable[int]]) -> str:
    """Return the initialiser of an array of structures of integers."""
    return "{" + ", ".join("{" + ", ".join(map(str, row)) + "}" for row in rows) + "}"


def _row(name: str, dtype: str | None, shape: Sequence[int]) -> str:
    kind = f'"{dtype}"' if dtype else "NULL"
    return f'{{"{name}", {kind}, {{{len(shape)}, {{{", ".join(map(str, shape))}}}}}}}'
