"""Small runs of the recall task, and an exception that interrupts them."""

from __future__ import annotations

from pathlib import Path

import torch

from ramnet import RamNetConfig, RamNetForCausalLM
from ramnet.training import Recipe
from ramnet.training.mqar import Mqar

SMALL = RamNetConfig(
    vocab_size=64, hidden_size=32, num_layers=1, num_heads=2, value_dim=16, order=5, sub_dim=2, top_k=8,
    conv_layers=1, tie_embeddings=True, embedding_std=0.25,
)  # fmt: skip
TASK = Mqar(pairs=3, length=12, vocab_size=64)


class PowerCutError(Exception):
    """Interrupts a run."""


class StopsAfter(Mqar):
    """The task, which raises after a number of batches."""

    def stop_after(self, batches: int) -> StopsAfter:
        object.__setattr__(self, "left", batches)
        return self

    def batch(self, size: int, generator: torch.Generator) -> tuple[torch.Tensor, torch.Tensor]:
        if size == RECIPE.batch_size:  # not the held-out examples
            object.__setattr__(self, "left", self.left - 1)
            if self.left < 0:
                raise PowerCutError
        return super().batch(size, generator)


RECIPE = Recipe(steps=7, batch_size=4, warmup_steps=3, weight_decay=0.1, seed=5)


def fresh(seed: int = 0) -> RamNetForCausalLM:
    torch.manual_seed(seed)
    return RamNetForCausalLM(SMALL)


def files(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}
