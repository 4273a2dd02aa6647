"""Which kernels the ops run on: a name that each thread has, and the table of what is registered under it."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Protocol

from torch import Tensor

from ramnet.plugins import load, plugins

REFERENCE = ""


class Backend(Protocol):
    """What ``lowering`` registers: the ops of ``ramnet.ops.library``, on other kernels, with the same contracts."""

    def address_decode(self, logits: Tensor, top_k: int) -> tuple[Tensor, Tensor]: ...

    def address_decode_backward(
        self, grad_weights: Tensor, logits: Tensor, slots: Tensor, weights: Tensor
    ) -> Tensor: ...

    def memory_scan(
        self, write_slots: Tensor, write_weights: Tensor, read_slots: Tensor, read_weights: Tensor,
        values: Tensor, memory: Tensor, mass: Tensor, decay_power: float, eps: float, proxy_eps: float,
    ) -> tuple[Tensor, Tensor, Tensor]: ...  # fmt: skip

    def memory_scan_backward(
        self, grad_output: Tensor, grad_memory: Tensor, grad_mass: Tensor,
        write_slots: Tensor, write_weights: Tensor, read_slots: Tensor, read_weights: Tensor,
        values: Tensor, memory: Tensor, mass: Tensor, decay_power: float, eps: float, proxy_eps: float,
    ) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]: ...  # fmt: skip

    def memory_step(
        self, write_slots: Tensor, write_weights: Tensor, read_slots: Tensor, read_weights: Tensor,
        values: Tensor, memory: Tensor, mass: Tensor, decay_power: float, eps: float,
    ) -> Tensor: ...  # fmt: skip


_backends: dict[str, Backend] = {}


class _Active(threading.local):
    """Not a ContextVar: torch.compile cannot read one, while it guards on what ``__init__`` gives each thread."""

    def __init__(self) -> None:
        self.name = REFERENCE


_active = _Active()


def register_backend(name: str, backend: Backend) -> None:
    """Make ``backend`` available to ``using(name)``; a second registration replaces the first."""
    _backends[name] = backend


def registered(name: str) -> Backend:
    """The backend of that name, made by its entry point in ``ramnet.backends`` when it is first asked for.

    ValueError, listing what there is, for an unknown name.
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
    """The name of the backend in use; empty for the reference."""
    return _active.name


@contextmanager
def using(name: str) -> Iterator[None]:
    """Run the ops on the backend ``name`` within the block; a backward pass stays on the backend of its forward.

    Other threads are not concerned: each begins on the reference, whose name is empty. ValueError, listing what there
    is, for an unknown name.
    """
    if name != REFERENCE:
        registered(name)
    before, _active.name = _active.name, name
    try:
        yield
    finally:
        _active.name = before
