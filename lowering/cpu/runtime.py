"""Loading and running compiled kernels: TVM's small runtime alone, 0.1 s to load where all of TVM takes 2 to 7 s."""

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

_INSTALL = "pip install 'ramnet[tvm]'"


@cache
def _ffi() -> Any:
    """The tvm_ffi module with TVM's runtime library loaded; ImportError, with the install line, without TVM."""
    found = importlib.util.find_spec("tvm")
    if found is None or found.origin is None or importlib.util.find_spec("tvm_ffi") is None:
        raise ImportError(f"the TVM kernels need apache-tvm, which is not installed: {_INSTALL}")
    import tvm_ffi

    # TVM halves the cores of an x86 machine for fear of hyper-threads, pins threads where torch's run too, and has them
    # spin there when they have nothing to do.
    os.environ.setdefault("TVM_NUM_THREADS", str(os.cpu_count() or 1))
    os.environ.setdefault("TVM_BIND_THREADS", "0")
    # (a process that only decodes is quicker with 20000: see autotune/bench/cpu/decode_process.py)
    os.environ.setdefault("TVM_THREAD_POOL_SPIN_COUNT", "0")
    for library in Path(found.origin).parent.rglob("*tvm_runtime.*"):
        if library.suffix in (".so", ".dylib", ".dll"):
            ctypes.CDLL(str(library), mode=ctypes.RTLD_GLOBAL)
    return tvm_ffi


def load(path: Path, name: str) -> Callable[..., None]:
    """The function ``name`` of a compiled library."""
    return _ffi().load_module(str(path))[name]


class _Pool(threading.local):
    """Each thread that calls kernels has a pool of TVM's of its own."""

    threads = 0


_pool = _Pool()
_Task = ctypes.CFUNCTYPE(ctypes.c_int, ctypes.c_int, ctypes.c_void_p, ctypes.c_void_p)


def match_threads() -> None:
    """Give the pool of this thread as many threads as torch has now."""
    wanted = torch.get_num_threads()
    if wanted == _pool.threads:
        return
    configure = _ffi().get_global_func("runtime.config_threadpool")
    if not _pool.threads:
        # A pool makes counters for the tasks of its first launch, and no room for one more: with 1 thread at first and
        # then 2 it would write 4 bytes behind them. So the first launch has as many tasks as there can be.
        configure(1, int(os.environ["TVM_NUM_THREADS"]))
        ctypes.CDLL(None).TVMBackendParallelLaunch(_Task(lambda *_: 0), None, 0)
    # Mode 1: big cores first, as by default; the count is what matters.
    configure(1, wanted)
    _pool.threads = wanted
