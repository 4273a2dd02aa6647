"""Buffers that the templates of the scans hand to one another together."""

from __future__ import annotations

from typing import Any, NamedTuple


class Accesses(NamedTuple):
    """Slots and weights of writes and reads; the last axis is k."""

    write_slots: Any
    write_weights: Any
    read_slots: Any
    read_weights: Any


class Factors(NamedTuple):
    """Of one head by token and k: what the forward walk keeps for the reverse walk.

    Attributes:
        decays: (1 − w)^γ of each write. slopes: the derivative of it (paper, step 7).
        inverses: 1 / (z + ε) at each read. masses: z before each write.
    """

    decays: Any
    slopes: Any
    inverses: Any
    masses: Any


class Gradients(NamedTuple):
    """Of the write weights, read weights, values, first memory and first mass."""

    write_weights: Any
    read_weights: Any
    values: Any
    memory: Any
    mass: Any
