"""The table of registered backends, and the name of the one that each thread uses."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, Protocol

from torch import Tensor

from ramnet.ops.accesses import Accesses
from ramnet.plugins import load, plugins

REFERENCE = ""


class Backend(Protocol):
    """Kernels for the ops of ``ramnet.ops.library``, with the same arguments and results."""

    def address_decode(self, logits: Tensor, top_k: int) -> tuple[Tensor, Tensor]: ...

    def address_decode_backward(
        self, grad_weights: Tensor, logits: Tensor, slots: Tensor, weights: Tensor
    ) -> Tensor: ...

    def memory_scan(
        self, accesses: Accesses[Tensor], values: Tensor, memory: Tensor, mass: Tensor,
        decay_power: float, eps: float, proxy_eps: float,
    ) -> tuple[Tensor, Tensor, Tensor]: ...  # fmt: skip

    def memory_scan_backward(
        self, grads: tuple[Tensor, Tensor, Tensor], accesses: Accesses[Tensor], values: Tensor, memory: Tensor,
        mass: Tensor, decay_power: float, eps: float, proxy_eps: float,
    ) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]: ...  # fmt: skip

    def memory_step(
        self, accesses: Accesses[Tensor], values: Tensor, memory: Tensor, mass: Tensor, decay_power: float, eps: float
    ) -> Tensor: ...


_backends: dict[str, Backend] = {}


class _Active(threading.local):
    """The backend's name for each thread. torch.compile can guard on it, which it cannot on a ContextVar."""

    def __init__(self) -> None:
        self.name = REFERENCE


_active = _Active()


def register_backend(name: str, backend: Backend) -> None:
    """Make ``backend`` available to ``using(name)``, replacing any backend registered under that name."""
    _backends[name] = backend


def registered(name: str) -> Backend:
    """Return the backend of that name. On first use its entry point in ``ramnet.backends`` creates it.

    Raises ValueError, listing the known names, if there is none.
    """
    if name not in _backends:
        found = plugins("ramnet.backends")
        if name not in found:
            raise ValueError(
                f"backend {name!r} is unknown; there are {', '.join(sorted({*_backends, *found})) or 'none'}"
            )
        register_backend(name, load(found[name])())
    return _backends[name]


def active() -> str:
    """Return the name of the backend that this thread uses; empty for the reference."""
    return _active.name


def keeping(function: Callable[..., Any]) -> Callable[..., Any]:
    """Return ``function`` on the backend that is in use now, also if another thread calls it later.

    A backward pass on a GPU runs in a thread of its own, where what it recomputes would run on the reference.
    """
    name = active()

    def kept(*arguments: Any) -> Any:
        with using(name):
            return function(*arguments)

    return kept


@contextmanager
def using(name: str) -> Iterator[None]:
    """Run the ops of this thread on the backend ``name`` within the block.

    A backward pass runs on the backend of its forward. Other threads are not affected; each starts on the reference,
    whose name is empty; "reference" stands for it, too. The block must not be left by ``await`` or ``yield``, as what
    runs in the thread meanwhile would run on the backend, too. Raises ValueError, listing the known names, if there is
    no backend of that name.
    """
    name = REFERENCE if name == "reference" else name
    if name != REFERENCE:
        registered(name)
    before, _active.name = _active.name, name
    try:
        yield
    finally:
        _active.name = before
