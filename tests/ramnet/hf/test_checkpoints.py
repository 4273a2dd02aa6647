"""Checkpoints of transformers: saved, loaded by the Auto classes, and converted to this project's format and back."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

pytest.importorskip("transformers", reason="ramnet.hf needs transformers: pip install 'ramnet[hf]'")

from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

from ramnet import RamNetConfig, RamNetForCausalLM
from ramnet.hf import HFRamNetConfig, HFRamNetForCausalLM, byte_tokenizer, convert
from tests.ramnet.hf.models import both
from tests.ramnet.test_model import SMALL, small_model, tokens

IDS = tokens(2, 9)


@pytest.mark.parametrize(("tied", "shards"), [(False, 1), (False, 3), (True, 3)])
def test_survives_its_files(tied: bool, shards: int, tmp_path: Path) -> None:
    model, hf = both(tie_embeddings=tied)
    hf.save_pretrained(tmp_path, max_shard_size="50GB" if shards == 1 else "3KB")
    assert (len(list(tmp_path.glob("*.safetensors"))) >= shards) and (tmp_path / "config.json").is_file()
    again, info = AutoModelForCausalLM.from_pretrained(tmp_path, output_loading_info=True)
    assert type(again) is HFRamNetForCausalLM and not any(info.values())
    assert again.config.ramnet == again.ramnet.config == model.config
    assert torch.equal(again(IDS).logits, model(IDS).logits)
    assert (again.get_output_embeddings().weight is again.get_input_embeddings().weight) == tied


@pytest.mark.parametrize(
    ("dtype", "options"),
    [(torch.bfloat16, {}), (torch.bfloat16, {"device_map": "auto"}), (torch.float64, {"device_map": {"": "cpu"}})],
)
def test_loads_in_another_dtype_on_a_device(dtype: torch.dtype, options: dict, tmp_path: Path) -> None:
    model, hf = both()
    hf.save_pretrained(tmp_path)
    again = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=dtype, **options)
    assert {x.dtype for x in again.parameters()} == {dtype} and again.device.type == "cpu"
    assert torch.equal(again(IDS).logits, model.to(dtype)(IDS).logits)


def test_weights_on_disk_are_read_when_they_are_needed(tmp_path: Path) -> None:
    model, hf = both()
    hf.save_pretrained(tmp_path / "model")
    again = AutoModelForCausalLM.from_pretrained(
        tmp_path / "model", device_map={"": "disk"}, offload_folder=tmp_path / "offload"
    )
    assert {x.device.type for x in again.parameters()} == {"meta"}
    assert torch.equal(again.generate(IDS, max_new_tokens=4), model.generate(IDS, 4))


def test_what_a_file_lacks_is_drawn_as_initial_weights_are(tmp_path: Path) -> None:
    _, hf = both(embedding_std=0.5, vocab_size=4000)
    hf.save_pretrained(tmp_path)
    lost = {"ramnet.embedding.weight", "ramnet.norm.weight", "ramnet.blocks.1.mixer.address_bias"}
    weights = load_file(tmp_path / "model.safetensors")
    save_file({k: x for k, x in weights.items() if k not in lost}, tmp_path / "model.safetensors", {"format": "pt"})
    again, info = HFRamNetForCausalLM.from_pretrained(tmp_path, output_loading_info=True)
    assert set(info["missing_keys"]) == lost
    fresh = RamNetForCausalLM(hf.config.ramnet)
    assert again.ramnet.embedding.weight.std().item() == pytest.approx(0.5, rel=0.02)
    assert torch.equal(again.ramnet.norm.weight, fresh.norm.weight)
    assert torch.equal(again.ramnet.blocks[1].mixer.address_bias, fresh.blocks[1].mixer.address_bias)
    kept = again.state_dict()
    assert all(torch.equal(kept[k], x) for k, x in weights.items() if k not in lost)


def test_a_configuration_is_saved_as_a_whole_whatever_the_presets_are(tmp_path: Path) -> None:
    for config in (RamNetConfig.preset("tiny"), SMALL):
        HFRamNetConfig(ramnet=config).save_pretrained(tmp_path)
        assert json.loads((tmp_path / "config.json").read_text())["ramnet"] == config.model_dump(mode="json")
        assert AutoConfig.from_pretrained(tmp_path).ramnet == config
    assert AutoConfig.from_pretrained(tmp_path, vocab_size=13).ramnet.vocab_size == 13


@pytest.mark.parametrize("tied", [False, True])
def test_both_formats_convert_into_each_other_without_loss(
    tied: bool, command_line: Callable[..., int], tmp_path: Path
) -> None:
    model = small_model(tie_embeddings=tied).to(torch.bfloat16)
    for module in model.modules():
        if isinstance(module, torch.nn.LayerNorm):
            module.float()  # weights of two types
    model.save_pretrained(tmp_path / "own")
    (tmp_path / "own" / "tokenizer.json").write_text("any")
    (tmp_path / "own" / "chat_template.jinja").write_text("{{ messages }}")
    (tmp_path / "own" / "additional_chat_templates").mkdir()
    (tmp_path / "own" / "additional_chat_templates" / "tool.jinja").write_text("{{ tools }}")
    (tmp_path / "own" / "generation_config.json").write_text('{"eos_token_id": 3}')
    for source, output in (("own", "hf"), ("hf", "own again"), ("own again", "hf again")):
        assert command_line("convert", tmp_path / source, tmp_path / output) == 0
    for folder in ("own", "hf"):
        found = [
            {path.name: path.read_bytes() for path in (tmp_path / name).rglob("*") if path.is_file()}
            for name in (folder, f"{folder} again")
        ]
        assert len(found[0]) == 6 and found[0] == found[1]


def test_the_index_of_shards_that_were_replaced_by_one_file_is_not_read(tmp_path: Path) -> None:
    model, hf = both()
    hf.save_pretrained(tmp_path / "hf", max_shard_size="3KB")
    index = (tmp_path / "hf" / "model.safetensors.index.json").read_bytes()
    hf.save_pretrained(tmp_path / "hf")
    (tmp_path / "hf" / "model.safetensors.index.json").write_bytes(index)
    convert(tmp_path / "hf", tmp_path / "own")
    assert torch.equal(RamNetForCausalLM.from_pretrained(tmp_path / "own")(IDS).logits, model(IDS).logits)


def test_shards_are_converted(tmp_path: Path) -> None:
    model, hf = both()
    hf.save_pretrained(tmp_path / "hf", max_shard_size="3KB")
    convert(tmp_path / "hf", tmp_path / "own")
    again = RamNetForCausalLM.from_pretrained(tmp_path / "own")
    assert all(torch.equal(x, model.state_dict()[name]) for name, x in again.state_dict().items())


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        ("same", "would be written over what is read; choose another folder"),
        ("none", "is not a checkpoint: it has no config.json"),
        ("json", "config.json is not JSON: "),
        ("other", "holds a model of type 'llama'; it must be a RAM-Net"),
        ("shape", "does not fit its config.json: head.weight is [5, 12]; it must be [11, 12]"),
        ("weights", "model.safetensors is not a file; a safetensors file was expected there"),
        ("index", "model.safetensors.index.json does not say which file has which weight; it is damaged"),
        ("cut index", "model.safetensors.index.json does not say which file has which weight; it is damaged"),
    ],
)
def test_a_checkpoint_that_cannot_be_converted_is_named(damage: str, message: str, tmp_path: Path) -> None:
    folder = tmp_path / "hf"
    both()[1].save_pretrained(folder)
    match damage:
        case "none":
            (folder / "config.json").unlink()
        case "json":
            (folder / "config.json").write_text("{")
        case "other":
            (folder / "config.json").write_text('{"model_type": "llama"}')
        case "shape":
            weights = load_file(folder / "model.safetensors")
            save_file({**weights, "ramnet.head.weight": torch.zeros(5, 12)}, folder / "model.safetensors")
        case "weights":
            (folder / "model.safetensors").unlink()
        case "index" | "cut index":
            (folder / "model.safetensors").unlink()
            (folder / "model.safetensors.index.json").write_text("{}" if damage == "index" else "{")
    with pytest.raises(ValueError) as caught:
        convert(folder, folder if damage == "same" else tmp_path / "own")
    assert message in str(caught.value) and str(folder) in str(caught.value) and "\n" not in str(caught.value)
    assert not (tmp_path / "own").exists()


def test_the_byte_tokenizer_survives_its_files(tmp_path: Path) -> None:
    byte_tokenizer().save_pretrained(tmp_path)
    again = AutoTokenizer.from_pretrained(tmp_path)
    text = "naïve\n\tĀ🙂\0"
    assert again(text)["input_ids"] == list(text.encode()) and again.pad_token_id == 0
    assert again.decode(list(text.encode())) == text


def test_a_configuration_without_its_fields_is_not_taken_for_the_default(tmp_path: Path) -> None:
    both()[1].save_pretrained(tmp_path)
    path = tmp_path / "config.json"
    path.write_text(json.dumps({name: x for name, x in json.loads(path.read_text()).items() if name != "ramnet"}))
    for load in (AutoModelForCausalLM.from_pretrained, HFRamNetConfig.from_pretrained):
        with pytest.raises(ValueError, match="the configuration has no field ramnet"):
            load(tmp_path)


def test_a_checkpoint_is_not_converted_into_a_file(tmp_path: Path) -> None:
    small_model().save_pretrained(tmp_path / "own")
    (tmp_path / "file").write_text("kept")
    with pytest.raises(ValueError, match=r"file is a file; a checkpoint needs a folder$"):
        convert(tmp_path / "own", tmp_path / "file")
    assert (tmp_path / "file").read_text() == "kept"


@pytest.mark.parametrize("name", ["temperature", "top_k", "hidden_size", "num_hidden_layers"])
def test_a_field_that_is_given_beside_the_configuration_is_named(name: str, tmp_path: Path) -> None:
    both()[1].save_pretrained(tmp_path)
    for load in (AutoConfig.from_pretrained, AutoModelForCausalLM.from_pretrained):
        with pytest.raises(ValueError, match=f"^{name} is given, but HFRamNetConfig takes a RamNetConfig as a whole"):
            load(tmp_path, **{name: 3})
    with pytest.raises(ValueError, match=f"^{name} is given, but "):
        HFRamNetConfig(ramnet=SMALL, **{name: 3})


def test_the_fields_may_be_given_as_json_at_any_time(tmp_path: Path) -> None:
    model, hf = both()
    hf.save_pretrained(tmp_path)
    fields = {**model.config.model_dump(mode="json"), "decay_power": 0.5}
    assert AutoModelForCausalLM.from_pretrained(tmp_path, ramnet=fields).ramnet.config.decay_power == 0.5
    hf.config.update({"ramnet": fields})
    assert hf.config.ramnet == model.config.model_copy(update={"decay_power": 0.5})
    for wrong in ({"x": 1}, {"decay_power": object()}):
        with pytest.raises(ValueError, match=r"^the field ramnet is not a RamNetConfig: "):
            hf.config.ramnet = wrong


def test_the_fields_of_a_file_that_was_edited_are_read(tmp_path: Path) -> None:
    both()[1].config.save_pretrained(tmp_path)
    written = json.loads((tmp_path / "config.json").read_text())
    assert written["tie_word_embeddings"] is False
    written["ramnet"]["tie_embeddings"] = True
    (tmp_path / "config.json").write_text(json.dumps(written))
    assert AutoConfig.from_pretrained(tmp_path).tie_word_embeddings is True


def test_weights_that_are_tied_later_are_saved_as_tied(tmp_path: Path) -> None:
    _, hf = both()
    hf.config.tie_word_embeddings = True
    hf.tie_weights()
    hf.ramnet.save_pretrained(tmp_path)
    assert torch.equal(RamNetForCausalLM.from_pretrained(tmp_path)(IDS).logits, hf(IDS).logits)
