"""What a token does to the memory: the slots that it writes and reads, and the weights of both."""

from __future__ import annotations

from typing import Generic, NamedTuple, TypeVar

Each = TypeVar("Each")


class Accesses(NamedTuple, Generic[Each]):
    """Slots and weights of the K writes and the K reads of each token; the last axis is K.

    Attributes:
        write_slots, read_slots: int32, distinct within a token, in 0..M-1.
        write_weights, read_weights: one floating type for both; writes in 0..1.

    They are tensors, [B, H, T, K] of a sequence or [B, H, K] of one token, and in a kernel's template the buffers of
    these.
    """

    write_slots: Each
    write_weights: Each
    read_slots: Each
    read_weights: Each
