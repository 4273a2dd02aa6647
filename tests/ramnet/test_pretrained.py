"""A model in its files: saved, loaded, damaged, and on a full disk."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from ramnet import RamNetConfig, RamNetForCausalLM
from ramnet.model import not_finite
from tests.ramnet.test_model import SMALL, assert_states_match, small_model, tokens
from tests.samples import full_disk


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_survives_its_files(tied: bool, dtype: torch.dtype, tmp_path: Path) -> None:
    model = small_model(tie_embeddings=tied).to(dtype)
    model.save_pretrained(tmp_path / "runs" / "small")
    assert sorted(x.name for x in (tmp_path / "runs" / "small").iterdir()) == ["config.json", "model.safetensors"]
    again = RamNetForCausalLM.from_pretrained(tmp_path / "runs" / "small")
    assert again.config == model.config
    assert torch.equal(again(tokens(2, 9)).logits, model(tokens(2, 9)).logits)
    assert (again.head.weight is again.embedding.weight) == tied
    assert [x.dtype for x in again.parameters()] == [dtype] * len(list(again.parameters()))


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("default", [torch.float32, torch.float64, torch.bfloat16])
def test_each_weight_keeps_its_own_type_whatever_the_default_is(
    tied: bool, default: torch.dtype, tmp_path: Path
) -> None:
    model = small_model(tie_embeddings=tied).to(torch.bfloat16)
    for module in model.modules():
        if isinstance(module, torch.nn.LayerNorm):
            module.float()
    expected = model(tokens(2, 9))
    model.save_pretrained(tmp_path)
    before = torch.get_default_dtype()
    torch.set_default_dtype(default)
    try:
        again = RamNetForCausalLM.from_pretrained(tmp_path)
        actual = again(tokens(2, 9))
    finally:
        torch.set_default_dtype(before)
    weights = model.state_dict()
    assert {name: x.dtype for name, x in again.state_dict().items()} == {name: x.dtype for name, x in weights.items()}
    assert all(torch.equal(x, weights[name]) for name, x in again.state_dict().items())
    assert actual.logits.dtype == torch.bfloat16 and torch.equal(actual.logits, expected.logits)
    assert_states_match(actual.state, expected.state, tolerance=0)
    assert len(list(again.parameters())) == len(list(model.parameters()))
    assert all(x.requires_grad for x in again.parameters())


def test_a_loaded_model_does_not_depend_on_its_file(tmp_path: Path) -> None:
    small_model().save_pretrained(tmp_path)
    again = RamNetForCausalLM.from_pretrained(tmp_path)
    path = tmp_path / "model.safetensors"
    path.write_bytes(b"\xff" * path.stat().st_size)  # overwrite in place, as cp does
    assert torch.equal(again(tokens(2, 9)).logits, small_model()(tokens(2, 9)).logits)


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("tied", [False, True])
def test_weights_that_are_not_finite_are_not_written(value: float, tied: bool, tmp_path: Path) -> None:
    model = small_model(tie_embeddings=tied)
    model.save_pretrained(tmp_path)
    before = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
    model.blocks[1].mixer.log_scale.data[1, 2] = value
    with pytest.raises(ValueError, match=r"^blocks\.1\.mixer\.log_scale holds NaN or infinity; .* is left as it is$"):
        model.save_pretrained(tmp_path)
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == before


def test_the_first_tensor_that_is_not_finite_is_named_and_empty_ones_are_finite() -> None:
    tensors = {"none": torch.zeros(0), "good": torch.ones(2), "bad": torch.tensor([1, torch.nan])}
    assert not_finite(tensors) == "bad"
    del tensors["bad"]
    assert not_finite(tensors) is None


def test_a_head_that_differs_from_the_tied_embedding_is_refused(tmp_path: Path) -> None:
    model = small_model(tie_embeddings=True)
    model.head.weight = torch.nn.Parameter(model.head.weight + 1)
    with pytest.raises(ValueError, match=r"head\.weight differs from embedding\.weight, but tie_embeddings is True"):
        model.save_pretrained(tmp_path / "model")
    assert not list(tmp_path.iterdir())


def test_weights_that_are_not_the_configs_replace_no_checkpoint(tmp_path: Path) -> None:
    model = small_model()
    model.save_pretrained(tmp_path)
    before = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
    torch.nn.utils.parametrizations.weight_norm(model.blocks[0].mixer.output)
    with pytest.raises(ValueError, match=r"^the model does not fit its config: blocks\.0\.mixer\.output\.param"):
        model.save_pretrained(tmp_path)
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == before


def test_a_subclass_may_have_weights_of_its_own(tmp_path: Path) -> None:
    class WithGain(RamNetForCausalLM):
        def __init__(self, config: RamNetConfig) -> None:
            super().__init__(config)
            self.gain = torch.nn.Parameter(torch.ones(3))

    WithGain(SMALL).save_pretrained(tmp_path)
    assert torch.equal(WithGain.from_pretrained(tmp_path).gain, torch.ones(3))


def test_a_folder_without_a_checkpoint_is_named(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=re.escape(f"{tmp_path} is not a checkpoint: it has no config.json")):
        RamNetForCausalLM.from_pretrained(tmp_path)
    SMALL.save(tmp_path / "config.json")
    with pytest.raises(ValueError, match=re.escape(f"{tmp_path / 'model.safetensors'} is not a file")):
        RamNetForCausalLM.from_pretrained(tmp_path)


UNFIT, UNTYPED = "does not fit its config.json: ", "; it must be a floating type of 16 to 64 bits"


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        ("truncated", "is not a safetensors file"),
        ("foreign", f"{UNFIT}blocks.0.ffn.down.weight is missing; it must be [12, 7]; 39 others do not fit either"),
        ("missing", f"{UNFIT}blocks.1.mixer.log_scale is missing; it must be [2, 3]"),
        ("extra", f"{UNFIT}blocks.9.mixer.log_scale is [2, 3]; it must be absent"),
        ("shape", f"{UNFIT}head.weight is [5, 12]; it must be [11, 12]"),
        ("shapes", f"{UNFIT}head.weight is [5, 12]; it must be [11, 12]; 1 others do not fit either"),
        ("integers", f"is torch.int32{UNTYPED}"),
        ("float8", f"is torch.float8_e4m3fn{UNTYPED}"),
        ("head", "holds head.weight, but config.json ties the head to embedding.weight"),
        ("text", "is not a safetensors file"),
    ],
)
def test_a_corrupted_or_foreign_checkpoint_is_named(damage: str, message: str, tmp_path: Path) -> None:
    small_model().save_pretrained(tmp_path)
    path = tmp_path / "model.safetensors"
    tensors = load_file(path)
    match damage:
        case "truncated":
            path.write_bytes(path.read_bytes()[:-9])
        case "foreign":
            save_file({"transformer.wte": torch.zeros(3)}, path)
        case "missing":
            save_file({name: x for name, x in tensors.items() if name != "blocks.1.mixer.log_scale"}, path)
        case "extra":
            save_file({**tensors, "blocks.9.mixer.log_scale": torch.zeros(2, 3)}, path)
        case "shape":
            save_file({**tensors, "head.weight": torch.zeros(5, 12)}, path)
        case "shapes":
            save_file({**tensors, "head.weight": torch.zeros(5, 12), "norm.bias": torch.zeros(5)}, path)
        case "integers":
            save_file({name: x.int() for name, x in tensors.items()}, path)
        case "float8":
            save_file({name: x.to(torch.float8_e4m3fn) for name, x in tensors.items()}, path)
        case "head":
            RamNetConfig(**{**SMALL.model_dump(), "tie_embeddings": True}).save(tmp_path / "config.json")
        case "text":
            path.write_text("version https://git-lfs.github.com/spec/v1\n")
    before = path.read_bytes()
    with pytest.raises(ValueError, match=f"^{re.escape(str(path))}.*{re.escape(message)}") as caught:
        RamNetForCausalLM.from_pretrained(tmp_path)
    assert "\n" not in str(caught.value)
    assert str(caught.value).endswith(message) or message == "is not a safetensors file"
    assert path.read_bytes() == before


def test_a_full_disk_keeps_the_old_checkpoint(tmp_path: Path) -> None:
    old, new = small_model(), small_model(hidden_size=24)
    old.save_pretrained(tmp_path)
    before = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
    for room in (10, 5000):  # no space for the config; space for the config but not for the weights
        with full_disk(after=room), pytest.raises(OSError, match="File too large"):
            new.save_pretrained(tmp_path)
        assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == before


def test_a_folder_that_cannot_be_written_is_named(tmp_path: Path) -> None:
    (tmp_path / "plain").write_text("x")
    with pytest.raises(NotADirectoryError, match=re.escape(f"{tmp_path / 'plain'} is not a folder")):
        small_model().save_pretrained(tmp_path / "plain" / "model")
    assert [path.name for path in tmp_path.iterdir()] == ["plain"]


@pytest.mark.parametrize("tied", [False, True])
def test_a_model_of_tensors_holds_them_and_draws_no_random_numbers(tied: bool) -> None:
    model = small_model(tie_embeddings=tied)
    tensors = {name: x for name, x in model.state_dict().items() if not (tied and name == "head.weight")}
    before = torch.get_rng_state()
    made = RamNetForCausalLM.of(model.config, tensors)
    assert torch.equal(torch.get_rng_state(), before)
    assert all(x.data_ptr() == tensors[name].data_ptr() for name, x in made.state_dict().items() if name in tensors)
    assert (made.head.weight is made.embedding.weight) == tied
    assert torch.equal(made(tokens(2, 9)).logits, model(tokens(2, 9)).logits)


def test_weights_that_were_tied_by_hand_are_written_twice(tmp_path: Path) -> None:
    model = small_model()
    model.head.weight = model.embedding.weight
    model.blocks[1].ffn = model.blocks[0].ffn
    model.save_pretrained(tmp_path)
    assert torch.equal(RamNetForCausalLM.from_pretrained(tmp_path)(tokens(1, 5)).logits, model(tokens(1, 5)).logits)


def test_a_quantised_model_is_refused_in_a_sentence(tmp_path: Path) -> None:
    class Quantised(torch.nn.Linear):
        def state_dict(self, *given: object, destination: dict, prefix: str = "", **named: object) -> dict:
            destination[prefix + "dtype"] = torch.qint8
            return destination

    model = small_model()
    model.head = Quantised(model.head.in_features, model.head.out_features, bias=False)
    with pytest.raises(ValueError, match=r"^the model does not fit its config: head\.weight is missing; "):
        model.save_pretrained(tmp_path / "out")
    assert not (tmp_path / "out").exists()
