"""A trained model is given more slots without training."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from ramnet import RamNetConfig, RamNetForCausalLM, ops
from ramnet.slots import with_more_slots

CONFIG = RamNetConfig(
    vocab_size=16, hidden_size=8, num_layers=3, num_heads=2, value_dim=4, order=(2, 3, 2), sub_dim=(2, 2, 3), top_k=2,
    cape_full_layers=1, address_bias="zeros",
)  # fmt: skip


def trained(config: RamNetConfig = CONFIG) -> RamNetForCausalLM:
    torch.manual_seed(0)
    model = RamNetForCausalLM(config)
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.5)
    return model


@pytest.mark.parametrize("sub_vectors", [1, 2])
@pytest.mark.parametrize("bias", [None, "zeros"])
def test_the_first_sub_vectors_of_queries_and_keys_are_repeated(
    monkeypatch: pytest.MonkeyPatch, sub_vectors: int, bias: str | None
) -> None:
    model = trained(CONFIG.model_copy(update={"address_bias": bias}))
    before = {name: x.clone() for name, x in model.state_dict().items()}
    larger = with_more_slots(model, 1, sub_vectors)
    assert [layer.slots for layer in larger.config.layers] == [4, 8 * 2**sub_vectors, 9]
    seen: list[Tensor] = []
    decode = ops.address_decode

    def watched(logits: Tensor, top_k: int) -> tuple[Tensor, Tensor]:
        seen.append(logits)
        return decode(logits, top_k)

    monkeypatch.setattr(ops, "address_decode", watched)
    x = torch.randn(1, 5, 8)
    results = [each.blocks[1].mixer(x).output for each in (model, larger)]
    few, many = seen
    torch.testing.assert_close(many, torch.cat([few, few[..., :sub_vectors, :]], dim=-2))
    assert not torch.equal(*results)
    # The rest is as it was, and shares no memory with the model.
    for name, x in larger.state_dict().items():
        if "blocks.1.mixer.query_key_value" not in name and "blocks.1.mixer.address_bias" not in name:
            assert torch.equal(x, before[name])
    values = 2 * 2 * 3 * 2  # rows of queries and keys
    torch.testing.assert_close(
        larger.blocks[1].mixer.query_key_value.weight[-8:], before["blocks.1.mixer.query_key_value.weight"][values:]
    )
    with torch.no_grad():
        for parameter in larger.parameters():
            parameter.zero_()
    assert all(torch.equal(x, before[name]) for name, x in model.state_dict().items())


@pytest.mark.parametrize(
    ("layer", "sub_vectors", "message"),
    [
        (3, 1, r"^layer is 3; it must be in 0\.\.2$"),
        (-1, 1, r"^layer is -1; it must be in 0\.\.2$"),
        (0, 1, r"^layer 0 has heads with CAPE"),
        (1, 0, r"^sub_vectors is 0; it must be in 1\.\.3, the layer's order$"),
        (2, 3, r"^sub_vectors is 3; it must be in 1\.\.2"),
    ],
)
def test_what_cannot_be_raised_is_named(layer: int, sub_vectors: int, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        with_more_slots(trained(), layer, sub_vectors)


@pytest.mark.parametrize(("layer", "sub_vectors"), [(True, 1), (1.0, 1), (1, True)])
def test_numbers_of_other_types_are_refused(layer: int, sub_vectors: int) -> None:
    with pytest.raises(TypeError, match="it must be an integer"):
        with_more_slots(trained(), layer, sub_vectors)


def test_a_model_that_is_not_as_it_was_built_is_refused() -> None:
    model = trained()
    torch.nn.utils.parametrizations.weight_norm(model.blocks[1].mixer.query_key_value)
    with pytest.raises(
        ValueError, match=r"the model is not as it was built: blocks\.1\.mixer\.query_key_value.*weight"
    ):
        with_more_slots(model, 1)


def test_a_copy_is_in_the_models_mode_and_trains_what_it_trains() -> None:
    model = trained().eval()
    model.head.weight.requires_grad_(False)
    larger = with_more_slots(model, 1)
    assert not larger.training
    assert [name for name, x in larger.named_parameters() if not x.requires_grad] == ["head.weight"]


def test_a_subclass_stays_what_it_is_unless_it_may_hold_more() -> None:
    class Louder(RamNetForCausalLM):
        def run_head(self, hidden: Tensor) -> Tensor:
            return 2 * super().run_head(hidden)

    class Larger(RamNetForCausalLM):
        def __init__(self, config: RamNetConfig) -> None:
            super().__init__(config)

    louder = Louder.of(CONFIG, trained().state_dict())
    ids = torch.arange(6).unsqueeze(0)
    torch.testing.assert_close(with_more_slots(louder, 1)(ids).logits, 2 * with_more_slots(trained(), 1)(ids).logits)
    with pytest.raises(ValueError, match=r"^Larger has a constructor of its own, so what else it holds is not known$"):
        with_more_slots(Larger(CONFIG), 1)


def test_a_model_of_another_kind_is_refused() -> None:
    with pytest.raises(TypeError, match=r"^model is a Linear; it must be a RamNetForCausalLM$"):
        with_more_slots(torch.nn.Linear(1, 1), 1)  # type: ignore[arg-type]
