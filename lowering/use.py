"""Running ``ramnet.ops`` on kernels within a block."""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache

from lowering.cpu import CpuKernels
from lowering.targets import find
from ramnet.ops import register_backend, using


@cache
def backend_name(target: str, tuned: bool, check: bool) -> str:
    """Register the kernels of ``target`` and give their name; empty, with one notice, where TVM is not installed."""
    name = find(target).name + ("" if tuned else ":default") + (":check" if check else "")
    try:
        register_backend(name, CpuKernels(tuned, check))
    except ImportError as error:
        warnings.warn(f"{error}; running the plain PyTorch reference instead", stacklevel=4)
        return ""
    return name


@contextmanager
def use(target: str = "cpu", *, tuned: bool = True, check: bool = False) -> Iterator[None]:
    """Run ``ramnet.ops`` on the kernels of ``target`` within the block, in eager calls and compiled graphs.

    Args:
        target: a name of ``lowering.TARGETS``.
        tuned: take the schedules of the records, else the defaults.
        check: refuse slots out of range or repeated, and NaN logits, as the reference does.

    Raises:
        ValueError: for an unknown target. Without TVM the reference runs, and a warning says so once.
    """
    with using(backend_name(target, tuned, check)):
        yield
