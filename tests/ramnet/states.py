"""A small configuration and random states of it, for the tests of RamState."""

from __future__ import annotations

import torch

from ramnet import RamNetConfig, RamState

CONFIG = RamNetConfig.preset(
    "tiny",
    hidden_size=6,
    num_layers=2,
    conv_layers=1,
    num_heads=[3, 2],
    value_dim=[5, 4],
    order=[3, 2],
    sub_dim=[3, 4],
)


def random_state(batch: int = 3) -> RamState:
    state = RamState.zeros(CONFIG, batch)
    generator = torch.Generator().manual_seed(0)
    for tensor in (*state.memory, *state.mass, *state.conv):
        tensor.copy_(torch.rand(tensor.shape, generator=generator))
    state.position.copy_(2**40 + torch.arange(batch))
    return state


def equal(a: RamState, b: RamState) -> bool:
    mine, theirs = a.tensors(), b.tensors()
    return mine.keys() == theirs.keys() and all(torch.equal(mine[name], theirs[name]) for name in mine)


def check(state: RamState, batch: int = 3, in_place: bool = False) -> None:
    state.check(CONFIG, batch, torch.device("cpu"), in_place)
