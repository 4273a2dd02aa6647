"""A small model, its outputs, and an adapter, for the tests of ``lowering.compile``."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn

from ramnet import RamNetConfig, RamNetForCausalLM
from tests.samples import relative_rmse

CONFIG = RamNetConfig(
    vocab_size=61, hidden_size=24, num_layers=2, num_heads=[2, 3], value_dim=[12, 5], order=[3, 2], sub_dim=[3, 5],
    top_k=[4, 6], cape_full_layers=1, cape_half_layers=1, intermediate_size=40, conv_layers=1, decay_power=2.0,
    address_bias="offsets",
)  # fmt: skip


LINEARS = ("blocks.1.mixer.query_key_value", "blocks.0.mixer.output", "blocks.1.ffn.gate_up", "blocks.0.ffn.down",
           "head", "convs.0.gate")  # fmt: skip


NORMS = ("blocks.0.mixer_norm", "blocks.1.ffn_norm", "norm")


OTHERS = ("blocks.1", "blocks.0.mixer", "blocks.1.ffn", "convs.0", "embedding")


def fresh(seed: int = 0) -> RamNetForCausalLM:
    torch.manual_seed(seed)
    return RamNetForCausalLM(CONFIG)


def ids(batch: int, tokens: int, seed: int = 1) -> Tensor:
    return torch.randint(0, CONFIG.vocab_size, (batch, tokens), generator=torch.Generator().manual_seed(seed))


@torch.no_grad()
def outputs(model: RamNetForCausalLM, batch: int = 1) -> Tensor:
    """Logits of a prompt and of the tokens after it, which update the state in place."""
    out = model(ids(batch, 7))
    steps = [model(ids(batch, 1, seed), out.state, in_place=True).logits for seed in range(5)]
    return torch.cat([out.logits, *steps], dim=1)


def assert_alike(fast: RamNetForCausalLM, model: RamNetForCausalLM, rows: tuple[int, ...] = (1, 2)) -> None:
    for batch in rows:
        assert relative_rmse(outputs(fast, batch), outputs(model, batch)) < 1e-5


class LowRank(nn.Module):
    """An adapter that replaces a linear layer."""

    def __init__(self, base: nn.Linear) -> None:
        super().__init__()
        self.base = base
        self.down, self.up = nn.Linear(base.in_features, 2, bias=False), nn.Linear(2, base.out_features, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.base(x) + self.up(self.down(x))


def put_in_place(model: RamNetForCausalLM, name: str, module: nn.Module) -> None:
    parent, _, last = name.rpartition(".")
    setattr(model.get_submodule(parent), last, module)


def adapt(name: str) -> Callable[[RamNetForCausalLM], None]:
    return lambda model: put_in_place(model, name, LowRank(model.get_submodule(name)))
