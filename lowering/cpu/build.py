"""Compiles the kernel of a workload under a schedule, with a disk cache."""

from __future__ import annotations

import hashlib
import os
import subprocess
import tempfile
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache as once
from pathlib import Path
from typing import Any

from lowering import cache
from lowering.compilers import cxx
from lowering.cpu import runtime
from lowering.fingerprint import fingerprint
from lowering.parsing import on_a_short_stack
from lowering.targets import cpu_digest, find
from schedules.base import Schedule
from schedules.workload import Workload


@dataclass(frozen=True)
class Kernel:
    """A compiled op. ``function`` takes the parameters that its template lists, contiguous, of the workload's dtype."""

    workload: Workload
    schedule: Schedule
    function: Callable[..., None]
    compiled_now: bool  # False if it was loaded from the disk cache


_loaded: dict[str, Kernel] = {}
_building = threading.Lock()


def lower(workload: Workload, target: str, schedule: Schedule) -> Kernel:
    """Return the kernel of ``workload`` for ``target`` under ``schedule``, from memory, from disk, or compiled now.

    Raises:
        ValueError: if the target is unknown or a GPU, or the schedule is not valid for the workload.
        ImportError: if TVM is not installed.
    """
    if find(target).gpu is not None:
        raise ValueError(f"target {target!r} is a GPU; lower builds kernels for 'cpu'")
    schedule.require(workload)
    key = cache_key(workload, target, schedule)
    if key not in _loaded:
        with _building:  # one thread builds a kernel, the others wait for it
            if key not in _loaded:
                _loaded[key] = _load_or_build(f"{workload.op}-{key}.so", workload, schedule)
    return _loaded[key]


def _load_or_build(name: str, workload: Workload, schedule: Schedule) -> Kernel:
    path = cache.find(name)
    if path is not None:
        return Kernel(workload, schedule, runtime.load(path, workload.op), False)
    executable = on_a_short_stack(compile_now, workload, schedule)
    if linker() is not None:
        path = cache.keep(name, lambda aside: _link(executable, aside))
    function = executable[workload.op] if path is None else runtime.load(path, workload.op)
    return Kernel(workload, schedule, function, True)


def _link(executable: Any, library: Path) -> None:
    """Write a shared library. Raises RuntimeError, with the linker's message, if linking fails."""
    with object_in_memory(executable) as place:
        done = subprocess.run([*(linker() or ()), "-shared", "-o", library, place], capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError((done.stderr or f"the linker ended with {done.returncode}").splitlines()[0])


@contextmanager
def object_in_memory(executable: Any) -> Iterator[str]:
    """Write a compiled module's object file to memory, as LLVM exits the process if it cannot write one to disk.

    Yields the path of the file; on a system without files in memory it is a temporary one on disk.
    """
    if not hasattr(os, "memfd_create"):
        with tempfile.TemporaryDirectory(prefix="ramnet-") as folder:
            executable.mod.write_to_file(f"{folder}/kernel.o", "o")
            yield f"{folder}/kernel.o"
        return
    handle = os.memfd_create("kernel.o")
    try:
        place = f"/proc/{os.getpid()}/fd/{handle}"
        executable.mod.write_to_file(place, "o")
        yield place
    finally:
        os.close(handle)


@once
def linker() -> list[str] | None:
    """Return the command of the compiler that links shared libraries; None, with a warning, if there is none."""
    found = cxx("g++", "clang++", "gcc", "clang", "cc")
    if found is None:
        cache.notice("there is no C++ compiler to link with")
    return found


def compile_now(workload: Workload, schedule: Schedule) -> Any:
    """Compile for this machine's processor. Raises ImportError, with the install command, if TVM is not installed."""
    runtime.match_threads()  # raises the ImportError
    import tvm

    from lowering.cpu.templates import TEMPLATES

    target = tvm.target.Target({"kind": "llvm", "mcpu": processor()})
    return tvm.compile(TEMPLATES[workload.op](workload, schedule), target=target)


def processor() -> str:
    """Return LLVM's name of this machine's processor."""
    import tvm

    return str(tvm.get_global_func("target.llvm_get_system_cpu")())


def cache_key(workload: Workload, target: str, schedule: Schedule) -> str:
    """Return a digest of everything that determines the machine code."""
    made_from = fingerprint(workload.op, target, schedule)
    parts = (workload.kernel_name, find(target).name, cpu_digest(), schedule.model_dump_json(), made_from)
    return hashlib.sha256("\n".join(parts).encode()).hexdigest()[:24]
