"""Groups of buffers that the TIR templates pass together."""

from __future__ import annotations

from typing import Any, NamedTuple


class Accesses(NamedTuple):
    """Slots and weights of writes and reads; the last axis is k."""

    write_slots: Any
    write_weights: Any
    read_slots: Any
    read_weights: Any


class Factors(NamedTuple):
    """What the forward pass over a head's tokens saves for the backward pass, each [T, K].

    Attributes:
        decays: (1 − w)^γ of each write.
        slopes: the derivative of the decay's proxy (paper, step 7).
        inverses: 1 / (z + ε) at each read.
        masses: z before each write.
    """

    decays: Any
    slopes: Any
    inverses: Any
    masses: Any


class Gradients(NamedTuple):
    """Gradients of the write weights, read weights, values, and initial memory and mass."""

    write_weights: Any
    read_weights: Any
    values: Any
    memory: Any
    mass: Any
