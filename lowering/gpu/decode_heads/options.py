"""What ``decode_heads`` needs to know of a RAM-Net mixer besides its tensors."""

from __future__ import annotations

from typing import NamedTuple


class MixerOptions(NamedTuple):
    """Attributes as in ``ramnet.RamLayer``; heads 0 to ``cape_heads`` shift their addresses by the position."""

    order: int
    sub_dim: int
    top_k: int
    cape_heads: int
    temperature: float
    decay_power: float
    eps: float
