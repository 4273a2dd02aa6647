"""From a workload, a target and a schedule to a kernel, cached on disk so that a second process compiles nothing."""

from __future__ import annotations

import hashlib
import os
import shutil
import subprocess
import threading
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache as once
from pathlib import Path
from typing import Any

from lowering import cache
from lowering.cpu import runtime
from lowering.fingerprint import fingerprint
from lowering.targets import cpu_digest, find
from schedules.base import Schedule
from schedules.workload import Workload


@dataclass(frozen=True)
class Kernel:
    """A compiled op: call it with the tensors that its template names, contiguous and of the workload's type."""

    workload: Workload
    schedule: Schedule
    function: Callable[..., None]
    compiled_now: bool  # False where the disk cache had it


_loaded: dict[str, Kernel] = {}
_building = threading.Lock()


def lower(workload: Workload, target: str, schedule: Schedule) -> Kernel:
    """The kernel of ``workload`` for ``target`` under ``schedule``, from memory, from disk, or compiled now.

    ValueError for an unknown target, for a GPU, and for a schedule that its own rule refuses for this workload.
    """
    if find(target).gpu is not None:
        raise ValueError(f"target {target!r} is a GPU; lower builds kernels for 'cpu'")
    schedule.require(workload)
    key = cache_key(workload, target, schedule)
    if key not in _loaded:
        with _building:  # so that threads wait for one kernel rather than build it each
            if key not in _loaded:
                _loaded[key] = _load_or_build(f"{workload.op}-{key}.so", workload, schedule)
    return _loaded[key]


def _load_or_build(name: str, workload: Workload, schedule: Schedule) -> Kernel:
    path = cache.find(name)
    if path is not None:
        return Kernel(workload, schedule, runtime.load(path, workload.op), False)
    executable = compile_now(workload, schedule)
    if linker() is not None:
        path = cache.keep(name, lambda aside: _link(executable, aside))
    function = executable[workload.op] if path is None else runtime.load(path, workload.op)
    return Kernel(workload, schedule, function, True)


def _link(executable: Any, library: Path) -> None:
    """Write a shared library; RuntimeError, with the linker's words, where it cannot be written."""
    if not hasattr(os, "memfd_create"):
        executable.export_library(str(library))
        return
    # The object stays in memory: LLVM ends the process where it cannot write one.
    handle = os.memfd_create("kernel.o")
    try:
        place = f"/proc/{os.getpid()}/fd/{handle}"
        executable.mod.write_to_file(place, "o")
        done = subprocess.run([str(linker()), "-shared", "-o", library, place], capture_output=True, text=True)
    finally:
        os.close(handle)
    if done.returncode:
        raise RuntimeError((done.stderr or f"the linker ended with {done.returncode}").splitlines()[0])


@once
def linker() -> str | None:
    """The C++ compiler that links shared libraries; a notice says once that nothing is kept if there is none."""
    found = map(shutil.which, (os.environ.get("CXX") or "g++", "clang++", "gcc", "clang", "cc"))
    path = next(filter(None, found), None)
    if path is None:
        cache.notice("no C++ compiler is there to link with")
    return path


def compile_now(workload: Workload, schedule: Schedule) -> Any:
    """TVM's executable for this machine's processor; ImportError, with the install line, without TVM."""
    runtime.match_threads()  # says what is missing where TVM is
    import tvm

    from lowering.cpu.templates import TEMPLATES

    target = tvm.target.Target({"kind": "llvm", "mcpu": processor()})
    return tvm.compile(TEMPLATES[workload.op](workload, schedule), target=target)


def processor() -> str:
    """This machine's processor by LLVM's name for it."""
    import tvm

    return str(tvm.get_global_func("target.llvm_get_system_cpu")())


def cache_key(workload: Workload, target: str, schedule: Schedule) -> str:
    """A digest of everything that decides the machine code."""
    made_from = fingerprint(workload.op, target, schedule)
    parts = (workload.kernel_name, find(target).name, cpu_digest(), schedule.model_dump_json(), made_from)
    return hashlib.sha256("\n".join(parts).encode()).hexdigest()[:24]
