"""RamNetConfig: presets, validation, JSON."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
import torch

from ramnet import RamNetConfig, RamNetForCausalLM
from ramnet.config import MOST_LAYERS


@pytest.mark.parametrize("name", ["tiny", "mqar", "340m"])
def test_a_preset_survives_its_file(name: str, tmp_path: Path) -> None:
    config = RamNetConfig.preset(name, decay_power=0.5)
    config.save(tmp_path / "deep" / "config.json")
    assert RamNetConfig.load(tmp_path / "deep" / "config.json") == config
    assert config.decay_power == 0.5


def test_the_language_model_of_the_paper() -> None:
    config = RamNetConfig.preset("340m")
    assert (config.hidden_size, config.num_layers, config.num_heads, config.value_dim) == (1024, 27, 16, 64)
    assert (config.order, config.sub_dim, config.layers[26].slots, config.top_k) == (5, 4, 1024, 8)
    assert [config.cape_heads(i) for i in range(27)] == 4 * [16] + 4 * [8] + 19 * [0]


def test_is_immutable() -> None:
    with pytest.raises(ValueError, match="frozen"):
        RamNetConfig.preset("tiny").top_k = 3


BY_LAYER: dict[str, Any] = {
    "num_layers": 3, "num_heads": [8, 4, 2], "value_dim": [16, 32, 8], "order": [2, 3, 1], "sub_dim": [4, 4, 64],
    "top_k": [4, 8, 16],
}  # fmt: skip


def test_sizes_are_one_number_or_one_of_each_layer(tmp_path: Path) -> None:
    config = RamNetConfig.preset("tiny", **BY_LAYER, decay_power=0.5)
    assert [x.slots for x in config.layers] == [16, 64, 64]
    assert [(x.num_heads, x.value_dim, x.top_k, x.decay_power) for x in config.layers] == [
        (8, 16, 4, 0.5), (4, 32, 8, 0.5), (2, 8, 16, 0.5)
    ]  # fmt: skip
    assert [config.cape_heads(i) for i in range(3)] == [8, 2, 0]
    config.save(tmp_path / "config.json")
    loaded = RamNetConfig.load(tmp_path / "config.json")
    assert loaded == config and hash(loaded) == hash(config) and loaded.layers == config.layers
    one = RamNetConfig.preset("tiny", order=[4, 4])
    assert one.layers == RamNetConfig.preset("tiny").layers and len(one.kinds) == 1


def test_a_copy_with_other_sizes_has_other_layers() -> None:
    config = RamNetConfig.preset("tiny").model_copy(update={"order": [4, 2]})
    assert [x.slots for x in config.layers] == [256, 16]
    with pytest.raises(ValueError, match=r"^RamNetConfig: order has 2 numbers but there are 3 layers$"):
        config.model_copy(update={"num_layers": 3})


def test_a_config_of_numbers_is_written_as_before_there_were_lists(tmp_path: Path) -> None:
    """Checkpoints and exports hold digests of this text."""
    text = """{
  "hidden_size": 64,
  "num_heads": 2,
  "value_dim": 32,
  "order": 6,
  "sub_dim": 2,
  "top_k": 16,
  "decay_power": 1.0,
  "temperature": 1.0,
  "eps": 1e-6,
  "proxy_eps": 0.01,
  "address_bias": null,
  "vocab_size": 8192,
  "num_layers": 1,
  "cape_full_layers": 0,
  "cape_half_layers": 0,
  "intermediate_size": 0,
  "conv_layers": 1,
  "conv_kernel": 3,
  "tie_embeddings": true,
  "embedding_std": 0.02,
  "norm_eps": 0.00001,
  "final_gain": 1.0
}
"""
    (tmp_path / "config.json").write_text(text)
    assert RamNetConfig.load(tmp_path / "config.json").to_json() == text


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"order": [2, 3]}, "order has 2 numbers but there are 3 layers"),
        ({"order": [2, 3, 1, 1]}, "order has 4 numbers but there are 3 layers"),
        ({"top_k": []}, "top_k has 0 numbers but there are 3 layers"),
        ({"order": [2, 3, 0]}, "layer 2: order = 0: Input should be greater than 0"),
        ({"num_heads": [8, "4", 2]}, "layer 1: num_heads = '4': Input should be a valid integer"),
        ({"num_heads": [[8], 4, 2]}, "layer 0: num_heads = [8]: Input should be a valid integer"),
        ({"sub_dim": [4, 1, 64]}, "layer 1: sub_dim = 1: Input should be greater than 1"),
        ({"top_k": [4, 8, 65]}, "layer 2: top_k is 65 but sub_dim**order has only 64 slots; use top_k <= 64"),
        ({"order": [2, 30, 1]}, "layer 1: sub_dim**order is 4**30 slots; int32 numbers at most 2147483647"),
        ({"hidden_size": [128, 128, 128]}, "hidden_size = [128, 128, 128]: Input should be a valid integer"),
    ],
)  # fmt: skip
def test_a_bad_number_is_named_with_its_layer(fields: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match="^" + re.escape(f"RamNetConfig: {message}") + "$"):
        RamNetConfig.preset("tiny", **{**BY_LAYER, **fields})


BAD: list[tuple[dict[str, Any], str]] = [
    ({"top_k": 257}, "top_k is 257 but sub_dim**order has only 256 slots; use top_k <= 256"),
    ({"top_k": 0}, "top_k = 0: Input should be greater than 0"),
    ({"order": 16}, "sub_dim**order is 4**16 slots; int32 numbers at most 2147483647"),
    ({"order": 20, "sub_dim": 3}, "sub_dim**order is 3**20 slots; int32 numbers at most 2147483647"),
    ({"order": 31, "sub_dim": 2}, "sub_dim**order is 2**31 slots; int32 numbers at most 2147483647"),
    ({"order": 10**9}, "sub_dim**order is 4**1000000000 slots; int32 numbers at most 2147483647"),
    ({"sub_dim": 1}, "sub_dim = 1: Input should be greater than 1"),
    ({"decay_power": -0.5}, "decay_power = -0.5: Input should be greater than or equal to 0"),
    ({"decay_power": float("nan")}, "decay_power = nan: Input should be a finite number"),
    ({"temperature": 0.0}, "temperature = 0.0: Input should be greater than or equal to 0.000001"),
    ({"proxy_eps": 1.5}, "proxy_eps = 1.5: Input should be less than or equal to 1"),
    ({"cape_full_layers": 3}, "cape_full_layers + cape_half_layers is 4 but there are 2 layers"),
    ({"hidden_size": "256"}, "hidden_size = '256': Input should be a valid integer"),
    ({"num_heads": True}, "num_heads = True: Input should be a valid integer"),
    ({"value_dim": 0}, "value_dim = 0: Input should be greater than 0"),
    ({"num_layers": 2**20}, "num_layers = 1048576: Input should be less than or equal to 1024"),
    ({"conv_layers": 2**20}, "conv_layers = 1048576: Input should be less than or equal to 1024"),
    ({"conv_kernel": 2**20}, "conv_kernel = 1048576: Input should be less than or equal to 1024"),
    ({"sub_dim": 10**100}, "sub_dim = 1000000"),
    ({"hidden_size": 10**5000}, "hidden_size = an integer of thousands of digits: Input should be less than"),
    ({"hidden_size": 2**30, "vocab_size": 2**30}, "a weight or a layer's memory would hold 1152921504606846976 num"),
    ({"hidden_size": 2**20, "order": 1, "sub_dim": 2**28},
     "a weight or a layer's memory would hold 2251799947902976 numbers"),
    ({"num_heads": 2**30, "value_dim": 2**15}, "a weight or a layer's memory would hold 9007199254740992 numbers"),
    ({"eps": 1e300}, "eps = 1e+300: Input should be less than or equal to 1"),
    ({"eps": 1e-300}, "eps = 1e-300: Input should be greater than or equal to"),
    ({"proxy_eps": 1e-300}, "proxy_eps = 1e-300: Input should be greater than or equal to"),
    ({"norm_eps": float("inf")}, "norm_eps = inf: Input should be a finite number"),
    ({"embedding_std": float("inf")}, "embedding_std = inf: Input should be a finite number"),
    ({"embedding_std": 1e300}, "embedding_std = 1e+300: Input should be less than or equal to 1000000"),
    ({"temperature": 1e-300}, "temperature = 1e-300: Input should be greater than or equal to"),
    ({"decay_power": 1e300}, "decay_power = 1e+300: Input should be less than or equal to 1000000"),
    ({"hiden_size": 256}, "hiden_size = 256: Extra inputs are not permitted"),
]  # fmt: skip


@pytest.mark.parametrize(("fields", "message"), BAD)
def test_bad_fields_are_named_with_their_value(fields: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match="^" + re.escape(f"RamNetConfig: {message}")) as caught:
        RamNetConfig.preset("tiny", **fields)
    assert "\n" not in str(caught.value)


def test_as_many_layers_as_the_limit_says_are_allowed() -> None:
    config = RamNetConfig.preset("tiny", num_layers=MOST_LAYERS, conv_layers=MOST_LAYERS, conv_kernel=MOST_LAYERS)
    assert RamNetConfig.model_validate_json(config.to_json()) == config


@pytest.mark.parametrize("fields", [{"top_k": 256}, {"order": 1, "sub_dim": 2**31 - 1}, {"cape_full_layers": 1}])
def test_sizes_at_their_limits_are_allowed(fields: dict[str, int]) -> None:
    assert RamNetConfig.preset("tiny", **fields).model_dump().items() >= fields.items()


@pytest.mark.parametrize(
    "fields",
    [{"eps": 1e-30}, {"eps": 1.0}, {"norm_eps": 1e-30}, {"norm_eps": 1.0}, {"temperature": 1e-6}, {"temperature": 1e6},
     {"decay_power": 0.0, "proxy_eps": 1e-30}, {"decay_power": 1e6}, {"embedding_std": 1e6}, {"embedding_std": 1e-300}],
)  # fmt: skip
def test_numbers_at_their_limits_give_finite_logits_and_gradients(fields: dict[str, Any]) -> None:
    torch.manual_seed(0)
    model = RamNetForCausalLM(RamNetConfig.preset("tiny", hidden_size=8, intermediate_size=8, **fields))
    logits = model(torch.arange(20).unsqueeze(0)).logits
    logits.square().mean().backward()
    assert bool(logits.isfinite().all())
    assert all(bool(x.grad.isfinite().all()) for x in model.parameters())


def test_a_missing_field_is_named() -> None:
    with pytest.raises(ValueError, match=r"^RamNetConfig: hidden_size is missing$"):
        RamNetConfig(vocab_size=256)


def test_an_unknown_preset_lists_those_there_are() -> None:
    with pytest.raises(ValueError, match="preset '1b' is unknown; there are 340m, mqar, tiny"):
        RamNetConfig.preset("1b")


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "Invalid JSON"),
        (b'{"vocab_size": 256', "Invalid JSON"),
        (b"[]", "Input should be an object"),
        (b"{}", "hidden_size is missing"),
        (b'{"model_type": "llama", "vocab_size": 256}', "hidden_size is missing"),
        (b'{"hidden_size": "' + b"x" * 10**6 + b'"}', "hidden_size = 'xxx"),
        (b"\xff\xfe\x00", "byte 0 is not UTF-8"),
    ],
)
def test_a_corrupted_or_foreign_file_is_named(content: bytes, message: str, tmp_path: Path) -> None:
    path = tmp_path / "config.json"
    path.write_bytes(content)
    with pytest.raises(ValueError, match=re.escape(str(path)) + ".*" + re.escape(message)) as caught:
        RamNetConfig.load(path)
    assert "\n" not in str(caught.value) and len(str(caught.value)) < 500
    assert path.read_bytes() == content


def test_a_field_out_of_range_in_a_file_is_named(tmp_path: Path) -> None:
    path = tmp_path / "config.json"
    path.write_text(RamNetConfig.preset("tiny").to_json().replace('"top_k": 8', '"top_k": 300'))
    with pytest.raises(ValueError, match=re.escape(f"{path} is not a RamNetConfig: top_k is 300 but")):
        RamNetConfig.load(path)


def test_a_checkpoint_of_transformers_is_named(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text('{"model_type": "ramnet", "ramnet": {}}')
    message = f"{tmp_path}/config.json is of transformers' format; make one of this project: ramnet convert {tmp_path} "
    with pytest.raises(ValueError, match=f"^{message}"):
        RamNetConfig.load(tmp_path / "config.json")
