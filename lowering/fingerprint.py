"""Digests of the source that a kernel is compiled from. They key the disk cache and detect stale records.

A digest covers the code, without comments and docstrings, of the modules that an op's kernel uses: its template and
what the template imports from ``lowering`` and ``schedules``. Modules are parsed, not imported.

A modelled record's digest also covers the time model, the counts of work that it reads, and the GPU's data. The model
is in a package that imports this one, and names its module in the entry points ``ramnet.time_models``.
"""

from __future__ import annotations

import ast
import hashlib
import importlib
import importlib.metadata
from collections.abc import Iterable, Iterator, Mapping
from contextlib import suppress
from functools import cache as remembered
from importlib.machinery import ModuleSpec, PathFinder
from pathlib import Path
from typing import Any

from lowering import cache, nvcc
from lowering.targets import TARGETS
from ramnet.plugins import plugins
from schedules.base import Schedule
from schedules.records import How, Record

# The module of each op's template, by compiler and by form; "" for an op with one form.
_TEMPLATES: dict[str, dict[str, dict[str, str]]] = {
    "llvm": {
        "address_decode": {"": "lowering.cpu.address_decode"},
        "address_decode_backward": {"": "lowering.cpu.address_decode_backward"},
        "memory_scan": {"": "lowering.cpu.memory_scan"},
        "memory_scan_backward": {"": "lowering.cpu.memory_scan_backward"},
        "memory_step": {"": "lowering.cpu.memory_step"},
    },
    "triton": {
        "address_decode": {"": "lowering.gpu.address_decode.triton"},
        "address_decode_backward": {"": "lowering.gpu.address_decode.triton_backward"},
        "memory_scan": {
            "serial": "lowering.gpu.memory_scan.serial.forward", "slots": "lowering.gpu.memory_scan.slots.forward",
        },
        "memory_scan_backward": {"slots": "lowering.gpu.memory_scan.slots.backward"},
        "memory_step": {"": "lowering.gpu.memory_step.triton"},
        "decode_heads": {"": "lowering.gpu.decode_heads.triton"},
    },
    "tir": {
        "address_decode": {"": "lowering.gpu.address_decode.template"},
        "address_decode_backward": {"": "lowering.gpu.address_decode.template"},
        "memory_scan": {"shared": "lowering.gpu.memory_scan.shared.forward"},
        "memory_scan_backward": {"shared": "lowering.gpu.memory_scan.shared.backward"},
        "memory_step": {"": "lowering.gpu.memory_step.template"},
        "decode_heads": {"": "lowering.gpu.decode_heads.template"},
    },
}  # fmt: skip
# The modules that plan an op's TIR kernels and count their work. Triton's kernels are planned by their templates. What
# compiles and runs TIR's kernels is the same for all plans, and no part of a count but for ``_COUNTS``.
_WORK = {
    "address_decode": "lowering.gpu.address_decode.tir",
    "address_decode_backward": "lowering.gpu.address_decode.tir",
    "memory_scan": "lowering.gpu.memory_scan.shared.plan",
    "memory_scan_backward": "lowering.gpu.memory_scan.shared.plan",
    "memory_step": "lowering.gpu.memory_step.tir",
    "decode_heads": "lowering.gpu.decode_heads.tir",
}
_RUNS, _COUNTS = "lowering.gpu.tir", ("lowering.gpu.instructions", "lowering.gpu.resources")
# The code that passes a template to its compiler, with the flags: modules, or "module:function".
_BUILDERS = {
    "llvm": ("lowering.cpu.build:compile_now",),
    "triton": (),
    "tir": ("lowering.gpu.cuda.generate", "lowering.gpu.tir:module", "lowering.nvcc"),
}
_PACKAGES = {
    "llvm": ("apache-tvm", "apache-tvm-ffi"), "triton": ("triton",), "tir": ("apache-tvm", "apache-tvm-ffi"),
}  # fmt: skip


def fingerprint(
    op: str, target: str, schedule: Schedule | None = None, versions_of: Mapping[str, str] | None = None,
    how: How = "measured",
) -> str:  # fmt: skip
    """Return a digest of the source of ``schedule``'s kernel and of its compilers' versions and flags.

    Args:
        schedule: None for all kernels of the op on ``target``, on which a search among them depends.
        versions_of: the compilers' versions; the installed ones if None.
        how: how the kernel's time is found; if modelled, the digest covers the time model, too.
    """
    found = dict(versions(target, schedule) if versions_of is None else versions_of)
    parts = [*sorted(_sources(op, target, schedule, how)), repr(sorted(found.items()))]
    if how != "measured":
        parts.append(repr(getattr(TARGETS.get(target), "gpu", None)))
    return hashlib.sha256("\n".join(parts).encode()).hexdigest()[:12]


def versions(target: str, schedule: Schedule | None = None) -> dict[str, str]:
    """Return the versions of the installed compilers that ``schedule``, or any schedule for ``target``, uses."""
    found: dict[str, str] = {}
    for compiler in _compilers(target, schedule):
        found |= package_versions(compiler)
    return found


def stale(record: Record) -> str | None:
    """Why a record does not tell of the kernel as it would be compiled (and modelled) here, in a few words, or None.

    Versions of compilers that are not installed here are not compared.
    """
    op, target, schedule = record.workload.op, record.target, record.schedule()
    if fingerprint(op, target, schedule, record.versions, record.how) != record.fingerprint:
        return "other code"
    here = versions(target, schedule)
    changed = [f"{name} {made}" for name, made in sorted(record.versions.items()) if here.get(name, made) != made]
    return ", ".join(changed) or None


def code(module: str) -> str:
    """Return a digest of the code of a module, or of one function for "module:function"."""
    name, _, function = module.partition(":")
    if not function:
        return _read(name)[0]
    tree = _parse(name)
    (found,) = (node for node in ast.walk(tree) if isinstance(node, ast.FunctionDef) and node.name == function)
    return _digest(found)


def closure(roots: Iterable[str]) -> set[str]:
    """Return ``roots`` and the modules of ``lowering`` and ``schedules`` that they import, directly or indirectly."""
    found: set[str] = set()
    waiting = list(roots)
    while waiting:
        name = waiting.pop()
        if name not in found:
            found.add(name)
            waiting += _read(name)[1]
    return found


def _sources(op: str, target: str, schedule: Schedule | None, how: How) -> tuple[str, ...]:
    compilers = _compilers(target, schedule)
    roots = _templates(op, target, schedule)
    others = {name for compiler in compilers for name in _BUILDERS[compiler]}
    if how != "measured":
        others |= closure([_WORK[op]]) - closure([_RUNS]) if "tir" in compilers else set()
        others |= {*_time_models(), *_COUNTS}
    return _digests(frozenset(roots), frozenset(others))


@remembered
def _time_models() -> frozenset[str]:
    """The modules that model a kernel's time."""
    return frozenset(entry.module for entry in plugins("ramnet.time_models").values())


def _templates(op: str, target: str, schedule: Schedule | None) -> set[str]:
    """Return the module of a schedule's template, or those of all templates of the op."""
    tables = [_TEMPLATES[compiler].get(op, {}) for compiler in _compilers(target, schedule)]
    if schedule is None:
        return {name for forms in tables for name in forms.values()}
    return {forms[getattr(schedule, "form", "")] for forms in tables}


@remembered
def package_versions(compiler: str) -> dict[str, str]:
    """Return the versions of the packages of a compiler: llvm, triton or tir.

    Without TVM, they are the versions that compiled the binaries in the cache (``lowering.cache.compilers``).
    """
    found = {}
    for name in _PACKAGES[compiler]:
        with suppress(importlib.metadata.PackageNotFoundError):
            found[name] = importlib.metadata.version(name)
    if compiler == "tir":
        if not found:  # only binaries that another machine compiled can be run
            return cache.compilers()
        if (version := nvcc.version()) is not None:
            found["nvcc"] = version
    return found


@remembered
def _digests(roots: frozenset[str], others: frozenset[str]) -> tuple[str, ...]:
    return tuple(code(name) for name in closure(roots) | others)


def _compilers(target: str, schedule: Any) -> tuple[str, ...]:
    if target == "cpu":
        return ("llvm",)
    return ("triton", "tir") if schedule is None else (schedule.compiler,)


@remembered
def _read(module: str) -> tuple[str, frozenset[str]]:
    """Return a module's digest and the modules of ``lowering`` and ``schedules`` that it imports, at any level.

    Imports that only type checkers read are left out.
    """
    tree = _parse(module)
    names: set[str] = set()
    for node in _run(tree):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module is not None and _is_ours(node.module):
            # A name imported from a package is either a module of the package or defined in its __init__.py.
            full = (f"{node.module}.{alias.name}" for alias in node.names)
            names |= {name if _find(name) else node.module for name in full}
    return _digest(tree), frozenset(filter(_is_ours, names))


def _run(node: ast.AST) -> Iterator[ast.AST]:
    """A syntax tree's nodes, without the blocks ``if TYPE_CHECKING``."""
    if not (isinstance(node, ast.If) and isinstance(node.test, ast.Name) and node.test.id == "TYPE_CHECKING"):
        yield node
        for inner in ast.iter_child_nodes(node):
            yield from _run(inner)


def _is_ours(module: str) -> bool:
    return module.partition(".")[0] in ("lowering", "schedules")


def _parse(module: str) -> ast.Module:
    spec = _find(module)
    if spec is None or spec.origin is None:
        raise ModuleNotFoundError(f"there is no module {module} to read the source of a kernel from")
    return ast.parse(Path(spec.origin).read_text(encoding="utf-8"))


@remembered
def _find(module: str) -> ModuleSpec | None:
    """Find a module, importing only its top-level package."""
    parent, _, _ = module.rpartition(".")
    if not parent:
        return importlib.import_module(module).__spec__
    above = _find(parent)
    path = None if above is None else above.submodule_search_locations
    return None if path is None else PathFinder.find_spec(module, path)


def _digest(tree: ast.AST) -> str:
    return hashlib.sha256(repr(_canonical(tree)).encode()).hexdigest()


def _canonical(node: Any) -> Any:
    """Convert a syntax tree to nested tuples that are the same in every version of Python.

    Docstrings are omitted, and so are empty fields, which some versions do not have.
    """
    if isinstance(node, list):
        return tuple(_canonical(each) for each in node if not _is_text(each))
    if isinstance(node, ast.AST):
        fields = ((name, _canonical(value)) for name, value in ast.iter_fields(node) if value not in (None, []))
        return type(node).__name__, tuple(field for field in fields if field[0] not in ("ctx", "kind"))
    return node


def _is_text(node: Any) -> bool:
    """Return whether a node is a docstring or another expression statement that is a string."""
    return isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant) and isinstance(node.value.value, str)
