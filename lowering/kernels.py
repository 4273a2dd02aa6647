"""From a workload, a target and a schedule to a kernel, cached on disk so that a second process compiles nothing."""

from __future__ import annotations

import hashlib
import importlib
import importlib.metadata
import os
import shutil
import warnings
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

from lowering import runtime
from lowering.targets import cpu_digest, find
from ramnet.files import written_aside
from schedules.base import Schedule
from schedules.workload import Workload


@dataclass(frozen=True)
class Kernel:
    """A compiled op: call it with the tensors that its template names, contiguous and of the workload's type.

    A GPU's takes the name of one of the template's functions before them, and tensors of the GPU.
    """

    workload: Workload
    schedule: Schedule
    function: Callable[..., None]
    compiled_now: bool  # False where the disk cache had it


_loaded: dict[str, Kernel] = {}


def lower(workload: Workload, target: str, schedule: Schedule) -> Kernel:
    """The kernel of ``workload`` for ``target`` under ``schedule``, from memory, from disk, or compiled now.

    ValueError for an unknown target, or a schedule that its own rule refuses for this workload; for a GPU's schedule
    the errors of ``lowering.gpu_tir.binary``.
    """
    if find(target).gpu is not None:
        from lowering.gpu_tir import binary

        made, compiled_now = binary(workload, target, schedule)
        return Kernel(workload, schedule, made.run, compiled_now)
    schedule.require(workload)
    key = cache_key(workload, target, schedule)
    if key not in _loaded:
        path = cache_folder() / f"{workload.op}-{key}.so"
        compiled_now = not path.is_file()
        if compiled_now:
            executable = compile_now(workload, schedule)
            if not can_link():
                _loaded[key] = Kernel(workload, schedule, executable[workload.op], True)
                return _loaded[key]
            with written_aside(path) as aside:
                executable.export_library(str(aside))
        _loaded[key] = Kernel(workload, schedule, runtime.load(path, workload.op), compiled_now)
    return _loaded[key]


def compile_now(workload: Workload, schedule: Schedule) -> Any:
    """TVM's executable for this machine's processor; ImportError, with the install line, without TVM."""
    runtime.match_threads()  # says what is missing where TVM is
    import tvm

    template = importlib.import_module(f"lowering.tir.{workload.op}")
    processor = tvm.get_global_func("target.llvm_get_system_cpu")()
    target = tvm.target.Target({"kind": "llvm", "mcpu": processor})
    return tvm.compile(template.module(workload, schedule), target=target)


@cache
def can_link() -> bool:
    """Whether a C++ compiler is there to link shared libraries; a warning says once that nothing is cached if not."""
    found = any(shutil.which(name) for name in (os.environ.get("CXX") or "g++", "clang++", "gcc", "clang", "cc"))
    if not found:
        warnings.warn(
            "no C++ compiler is there to link with, so kernels are compiled anew in each process", stacklevel=3
        )
    return found


def cache_folder() -> Path:
    """Where compiled kernels lie: ``RAMNET_CACHE``, or ramnet in the user's cache folder."""
    folder = os.environ.get("RAMNET_CACHE")
    if folder:
        return Path(folder)
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "ramnet"


def cache_key(workload: Workload, target: str, schedule: Schedule) -> str:
    """A digest of everything that decides the machine code."""
    parts = (workload.kernel_name, find(target).name, cpu_digest(), schedule.model_dump_json(), fingerprint())
    return hashlib.sha256("\n".join(parts).encode()).hexdigest()[:24]


@cache
def versions(target: str = "cpu") -> dict[str, str]:
    """The versions of the target's compilers, of those that are installed; TVM's must be for the CPU."""
    tvm = ("apache-tvm", "apache-tvm-ffi")
    if target == "cpu":
        return {name: importlib.metadata.version(name) for name in tvm}
    found = {}
    for name in ("triton", *tvm):
        with suppress(importlib.metadata.PackageNotFoundError):
            found[name] = importlib.metadata.version(name)
    return found


@cache
def fingerprint(target: str = "cpu") -> str:
    """A digest of the source of the target's kernels and the compilers' versions."""
    digest = hashlib.sha256(repr(sorted(versions(target).items())).encode())
    for folder in ("tir",) if target == "cpu" else ("tir", "triton"):
        for path in sorted((Path(__file__).parent / folder).glob("*.py")):
            digest.update(path.read_bytes())
    return digest.hexdigest()[:12]
