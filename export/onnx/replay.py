"""A backend that runs PyTorch's reference with the slots that onnxruntime chose."""

from __future__ import annotations

from collections import deque

import torch
from torch import Tensor

from ramnet.ops import reference

# Beside a weight of 1, weights below e^_LEAST change no result, and their logarithms need not agree.
_LEAST = -69.0


class Replay:
    """A backend of the ops: the reference, but with given slots; ``slots`` holds one entry per layer.

    If the scores of two slots are equal up to rounding, two correct programs may choose different slots, and their
    outputs then differ by far more than rounding. So a comparison uses the other program's slots and checks them
    separately: ``worst`` is the largest |log(weight of a chosen slot) - log(the best weight of that rank)|.
    """

    def __init__(self) -> None:
        self.slots: deque[Tensor] = deque()
        self.worst = 0.0

    def address_decode(self, logits: Tensor, top_k: int) -> tuple[Tensor, Tensor]:
        slots = self.slots.popleft()
        order, sub_dim = logits.shape[-2:]
        log_p = logits.log_softmax(dim=-1)
        digits = slots.long().unsqueeze(-2) // (sub_dim ** torch.arange(order)).unsqueeze(-1) % sub_dim  # [..., U, K]
        log_weights = log_p.gather(-1, digits).sum(-2)  # [..., K]
        best = reference.address_decode(logits.double(), top_k)[1].log()
        off = (log_weights.clamp(min=_LEAST) - best.clamp(min=_LEAST)).abs()
        loss = float(off.max()) if off.numel() else 0.0
        self.worst = loss if not loss <= self.worst else self.worst  # keeps NaN
        return slots, log_weights.exp()

    address_decode_backward = staticmethod(reference.address_decode_backward)
    memory_scan = staticmethod(reference.memory_scan)
    memory_scan_backward = staticmethod(reference.memory_scan_backward)
    memory_step = staticmethod(reference.memory_step)
