"""Which parameters decay."""

import pytest
import torch

from ramnet import RamNetConfig
from ramnet.baselines import BaselineConfig
from ramnet.training import Recipe
from ramnet.training.model import make
from ramnet.training.optimizer import adamw
from tests.ramnet.training.runs import SMALL

RAM_NET = SMALL.model_copy(
    update={"tie_embeddings": False, "intermediate_size": 8, "address_bias": "offsets", "conv_layers": 1}
)
RWKV7 = BaselineConfig(mixer="rwkv7", vocab_size=8, hidden_size=8, num_layers=1, num_heads=1, key_dim=8, value_dim=8)
DECAYING = {
    "ramnet": {
        "convs.0.taps", "convs.0.gate.weight", "blocks.0.mixer.query_key_value.weight", "blocks.0.mixer.output.weight",
        "blocks.0.ffn.gate_up.weight", "blocks.0.ffn.down.weight", "head.weight",
    },
    "tied": {"convs.0.taps", "convs.0.gate.weight", "blocks.0.mixer.query_key_value.weight",
             "blocks.0.mixer.output.weight", "blocks.0.ffn.gate_up.weight", "blocks.0.ffn.down.weight"},
}  # fmt: skip


@pytest.mark.parametrize("kind", ["ramnet", "tied"])
def test_only_matrices_and_taps_decay(kind: str) -> None:
    model = make(RAM_NET.model_copy(update={"tie_embeddings": kind == "tied"}))
    optimizer = adamw(model, Recipe(steps=1, weight_decay=0.1, beta1=0.8, beta2=0.7))
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    decay = {names[id(x)]: group["weight_decay"] for group in optimizer.param_groups for x in group["params"]}
    assert decay.keys() == set(names.values())
    assert {name for name, rate in decay.items() if rate == 0.1} == DECAYING[kind]
    assert {rate for name, rate in decay.items() if name not in DECAYING[kind]} == {0}
    assert {"blocks.0.mixer.log_scale", "blocks.0.mixer.address_bias", "convs.0.gate.bias"} <= decay.keys()
    assert [group["betas"] for group in optimizer.param_groups] == [(0.8, 0.7)] * 2


def test_the_vectors_of_a_baseline_do_not_decay() -> None:
    model = make(RWKV7)
    (_, kept) = adamw(model, Recipe(steps=1, weight_decay=0.1)).param_groups
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    found = {names[id(x)].removeprefix("blocks.0.mixer.") for x in kept["params"]}
    assert {"shift", "removal", "blend", "bonus", "norm.weight", "decay.2.bias", "embedding.weight"} <= found
    assert not {name for name in found if name.endswith("weight") and not ("norm" in name or "embedding" in name)}


def test_a_parameter_without_a_gradient_shrinks_by_its_decay() -> None:
    model = make(
        RamNetConfig.preset("mqar", vocab_size=16, hidden_size=8, num_layers=1, order=2, top_k=2, conv_layers=1)
    )
    before = {name: x.detach().clone() for name, x in model.named_parameters()}
    for parameter in model.parameters():
        parameter.grad = torch.zeros_like(parameter)
    adamw(model, Recipe(steps=1, weight_decay=0.5, learning_rate=0.1)).step()
    shrunk = {name for name, x in model.named_parameters() if not torch.equal(x, before[name])}
    assert shrunk == {"convs.0.taps", "convs.0.gate.weight", "blocks.0.mixer.query_key_value.weight",
                      "blocks.0.mixer.output.weight"}  # fmt: skip
