"""The small model that fuzzed input is given to."""

from __future__ import annotations

from functools import cache

import torch

import lowering
from ramnet import RamNetConfig, RamNetForCausalLM

SMALL = RamNetConfig(
    vocab_size=256, hidden_size=8, num_layers=1, num_heads=2, value_dim=4, order=2, sub_dim=3, top_k=2,
    cape_full_layers=1, conv_layers=1,
)  # fmt: skip


PROMPT = torch.tensor([[3, 1, 4, 1, 5]])


@cache
def small_model() -> RamNetForCausalLM:
    torch.manual_seed(0)
    return RamNetForCausalLM(SMALL)


@cache
def small_fast_model() -> RamNetForCausalLM:
    return lowering.compile(small_model(), backend="eager")
