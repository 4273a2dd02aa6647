"""Loads compiled kernels with TVM's runtime library, which takes 0.1 s, where importing all of TVM takes 2 to 7 s."""

from __future__ import annotations

import ctypes
import importlib.util
import os
import threading
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import torch

from ramnet.processes import usable_cores

_INSTALL = "pip install 'ramnet[tvm]'"


@cache
def _ffi() -> Any:
    """Load TVM's runtime library and return tvm_ffi. Raises ImportError, with the install command, without TVM."""
    found = importlib.util.find_spec("tvm")
    if found is None or found.origin is None or importlib.util.find_spec("tvm_ffi") is None:
        raise ImportError(f"the TVM kernels need apache-tvm, which is not installed: {_INSTALL}")
    import tvm_ffi

    # By default, TVM uses half of an x86 machine's logical cores, pins its threads to cores that torch's threads use
    # too, and lets idle threads spin there.
    if not os.environ.get("TVM_NUM_THREADS"):
        os.environ["TVM_NUM_THREADS"] = str(usable_cores())
    _most_threads()  # remembers it
    os.environ.setdefault("TVM_BIND_THREADS", "0")
    # A process that only decodes is faster with a spin count of 20000.
    os.environ.setdefault("TVM_THREAD_POOL_SPIN_COUNT", "0")
    for library in Path(found.origin).parent.rglob("*tvm_runtime.*"):
        if library.suffix in (".so", ".dylib", ".dll"):
            ctypes.CDLL(str(library), mode=ctypes.RTLD_GLOBAL)
    return tvm_ffi


@cache
def _most_threads() -> int:
    """Return the number of threads that TVM's runtime was loaded with, whatever becomes of the environment.

    Raises ValueError if the variable does not hold a number.
    """
    given = os.environ["TVM_NUM_THREADS"]
    if not given.isdecimal() or not int(given):
        raise ValueError(f"TVM_NUM_THREADS is {given!r}; it must be a whole number of at least 1")
    return int(given)


def load(path: Path, name: str) -> Callable[..., None]:
    """Load the function ``name`` from a compiled library."""
    return _ffi().load_module(str(path))[name]


class _Pool(threading.local):
    """The size of TVM's thread pool, of which each calling thread has its own."""

    threads = 0


_pool = _Pool()
_Task = ctypes.CFUNCTYPE(ctypes.c_int, ctypes.c_int, ctypes.c_void_p, ctypes.c_void_p)


def match_threads() -> None:
    """Set the size of this thread's TVM pool to torch's current number of threads."""
    wanted = torch.get_num_threads()
    if wanted == _pool.threads:
        return
    configure = _ffi().get_global_func("runtime.config_threadpool")
    if not _pool.threads:
        # A pool allocates task counters in its first launch and never grows them; a later launch with more threads
        # writes out of bounds. So the first launch uses the largest number of threads.
        configure(1, _most_threads())
        ctypes.CDLL(None).TVMBackendParallelLaunch(_Task(lambda *_: 0), None, 0)
    # Mode 1, the default, prefers big cores.
    configure(1, wanted)
    _pool.threads = wanted
