"""``lowering.use``: runs ``ramnet.ops`` on kernels within a block."""

from __future__ import annotations

import importlib.util
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from typing import TYPE_CHECKING

from lowering.cpu.backend import CpuKernels
from lowering.gpu.compilers import interpreted
from lowering.targets import Target, find, here
from ramnet.ops import register_backend, using

if TYPE_CHECKING:
    from lowering.gpu.backend import GpuKernels


@cache
def backend_name(target: str, tuned: bool, check: bool) -> str:
    """Register the kernels of ``target`` and return the backend's name; if a package is missing, warn and return "".

    Raises RuntimeError for a GPU target on a machine without a GPU.
    """
    found = find(target)
    name = found.name + ("" if tuned else ":default") + (":check" if check else "")
    try:
        register_backend(name, CpuKernels(tuned, check) if found.gpu is None else _gpu_kernels(found, tuned, check))
    except ImportError as error:
        warnings.warn(f"{error}; running the plain PyTorch reference instead", stacklevel=4)
        return ""
    return name


def read_records_again() -> None:
    """Let the next ``use`` choose schedules anew, as records have changed."""
    backend_name.cache_clear()


@contextmanager
def use(target: str = "cpu", *, tuned: bool = True, check: bool = False) -> Iterator[None]:
    """Run the ``ramnet.ops`` of this thread, eager or compiled, on the kernels of ``target`` within the block.

    Args:
        target: a name in ``lowering.TARGETS``. For a GPU, tensors must be on this machine's GPU, which then runs with
            the schedules of the named one.
        tuned: use the tuned schedules of the records; if False, the default schedules.
        check: also raise ValueError for slots repeated within a token and for logits with an undefined softmax, as the
            reference does. This synchronises with a GPU. Without it, such logits give weights of NaN.

    Raises:
        ValueError: if the target is unknown.
        RuntimeError: if the target is a GPU and this machine has none. If TVM or Triton is not installed, the reference
            runs instead, with one warning.
    """
    with using(backend_name(target, tuned, check)):
        yield


def gpu_backend() -> GpuKernels:
    """Return the tuned kernels of this machine's GPU; an entry point of ``ramnet.backends``."""
    found = here()
    if found is None:
        raise RuntimeError("there is no GPU here for the backend 'gpu' to run on; there is 'cpu'")
    return _gpu_kernels(found, True, False)


def _gpu_kernels(target: Target, tuned: bool, check: bool) -> GpuKernels:
    """Return the kernels of ``target``, to run on this machine's GPU or on Triton's interpreter."""
    present = here()
    if present is None and not interpreted():
        raise RuntimeError(
            f"there is no GPU here, so nothing can run for target {target.name!r};"
            f" `ramnet tune --target {target.name}` compiles for it"
        )
    if importlib.util.find_spec("triton") is None:
        raise ImportError("the GPU kernels need triton, which is not installed: pip install 'ramnet[gpu]'")
    from lowering.gpu.backend import GpuKernels

    if present is not None and present.name != target.name:
        warnings.warn(
            f"the GPU here is {present.description}; it runs with the schedules of {target.name}", stacklevel=5
        )
    return GpuKernels(target.name, tuned, check)
