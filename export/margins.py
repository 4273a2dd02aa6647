"""How near a model's addresses are to a tie."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from torch import Tensor

from ramnet.ops import reference, register_backend, using

_NAME = "margins"


class _Margins:
    """A backend of the ops: the reference, which notes the smallest margin of the addresses that it decodes."""

    def __init__(self) -> None:
        self.smallest = math.inf

    def address_decode(self, logits: Tensor, top_k: int) -> tuple[Tensor, Tensor]:
        order, sub_dim = logits.shape[-2:]
        more = min(top_k + 1, sub_dim**order)
        slots, weights = reference.address_decode(logits, more)
        if more > top_k:
            margin = weights[..., top_k - 1].log() - weights[..., top_k].log()
            self.smallest = min(self.smallest, float(margin.min()))
        return slots[..., :top_k].contiguous(), weights[..., :top_k].contiguous()

    address_decode_backward = staticmethod(reference.address_decode_backward)
    memory_scan = staticmethod(reference.memory_scan)
    memory_scan_backward = staticmethod(reference.memory_scan_backward)
    memory_step = staticmethod(reference.memory_step)


@contextmanager
def margins() -> Iterator[Callable[[], float]]:
    """Run a model's addresses on the reference within the block.

    Yields a function that returns, since its last call, the smallest difference of the logarithms of an address's K-th
    and next weights; infinite if every slot is chosen.
    """
    noted = _Margins()
    register_backend(_NAME, noted)

    def smallest() -> float:
        found, noted.smallest = noted.smallest, math.inf
        return found

    with using(_NAME):
        yield smallest
