"""The arguments of ``decode_heads`` that are not tensors."""

from __future__ import annotations

from typing import NamedTuple


class MixerOptions(NamedTuple):
    """The attributes of a ``ramnet.RamLayer``; the first ``cape_heads`` heads use CAPE."""

    order: int
    sub_dim: int
    top_k: int
    cape_heads: int
    temperature: float
    decay_power: float
    eps: float
