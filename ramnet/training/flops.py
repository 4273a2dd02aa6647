"""Floating-point operations of training, and how many of them the machine can do."""

from __future__ import annotations

import time

import torch
from torch import nn

from ramnet.training.model import Model

_SIZE = {"cpu": 512, "cuda": 4096}  # of the square matrices whose product is timed


def step_flops(model: Model, tokens: int, labels: int) -> int:
    """Return the operations of the linear layers of ``model`` in a training step; the head's are those of its labels.

    Each weight is multiplied and added once forward and twice backward: 6 operations. The memory ops of RAM-Net, which
    move bytes rather than compute (0.2 % of the operations at the sizes of "340m"), and the products of attention are
    not counted, nor is what is recomputed.
    """
    every = sum(module.weight.numel() for module in model.modules() if isinstance(module, nn.Linear))
    head = model.head.weight.numel()
    return 6 * ((every - head) * tokens + head * labels)


def peak_flops(device: torch.device, dtype: torch.dtype) -> float:
    """Return the operations per second that a large matrix product reaches on ``device``: the best of five."""
    size = _SIZE[device.type]
    a = torch.ones(size, size, device=device, dtype=dtype)
    seconds = []
    for _ in range(5):
        began = time.perf_counter()
        float((a @ a)[0, 0])  # waits for a GPU
        seconds.append(time.perf_counter() - began)
    return 2 * size**3 / min(seconds)
