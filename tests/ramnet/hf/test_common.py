"""What transformers' own tests ask of every model, as far as other tests here do not."""

from __future__ import annotations

import copy
import importlib.util
import pickle
import runpy
from pathlib import Path

import pytest
import torch

pytest.importorskip("transformers", reason="ramnet.hf needs transformers: pip install 'ramnet[hf]'")

from accelerate import cpu_offload
from transformers import AutoModelForCausalLM, TextStreamer
from transformers.modeling_outputs import CausalLMOutputWithPast

import ramnet.hf
from ramnet.hf import HFRamNetConfig, HFRamNetForCausalLM, byte_tokenizer
from tests.ramnet.hf.models import both
from tests.ramnet.test_model import SMALL, small_model, tokens

IDS = tokens(2, 9)


def test_a_tuple_holds_what_the_named_outputs_do() -> None:
    _, hf = both()
    options = {"labels": IDS, "output_hidden_states": True}
    named = hf(IDS, **options)
    assert type(named) is CausalLMOutputWithPast and list(named) == ["loss", "logits", "cache", "hidden_states"]
    loss, logits, _, hidden = hf(IDS, **options, return_dict=False)
    assert torch.equal(loss, named.loss) and torch.equal(logits, named.logits)
    assert all(torch.equal(x, y) for x, y in zip(hidden, named.hidden_states, strict=True))


@pytest.mark.parametrize("checkpointed", [False, True])
def test_hidden_states_keep_gradients(checkpointed: bool) -> None:
    _, hf = both()
    if checkpointed:
        hf.train().activation_checkpointing_enable()
    out = hf(IDS, labels=IDS, output_hidden_states=True)
    for hidden in out.hidden_states:
        hidden.retain_grad()
    out.loss.backward()
    assert all(hidden.grad.abs().sum().item() > 0 for hidden in out.hidden_states)


def test_rows_of_a_batch_do_not_see_each_other() -> None:
    _, hf = both()
    alone = torch.cat([hf(IDS[row : row + 1]).logits for row in (0, 1)])
    assert torch.allclose(hf(IDS).logits, alone, atol=1e-6)


def test_copies_and_pickles_compute_the_same() -> None:
    _, hf = both(tie_embeddings=True)
    for again in (copy.deepcopy(hf), pickle.loads(pickle.dumps(hf))):
        assert torch.equal(again(IDS).logits, hf(IDS).logits)
        assert again.get_input_embeddings().weight is again.get_output_embeddings().weight
        assert again.config.ramnet == SMALL.model_copy(update={"tie_embeddings": True})


def test_a_model_from_a_configuration_and_a_dtype() -> None:
    hf = AutoModelForCausalLM.from_config(HFRamNetConfig(ramnet=SMALL), dtype=torch.bfloat16)
    assert type(hf) is HFRamNetForCausalLM and hf.dtype == torch.bfloat16
    assert hf.num_parameters() == sum(x.numel() for x in small_model().parameters())


@pytest.mark.parametrize("tied", [False, True])
def test_a_model_made_of_another_shares_its_parameters_frozen_or_not(tied: bool) -> None:
    model = small_model(tie_embeddings=tied).train()
    model.embedding.requires_grad_(False)
    hf = HFRamNetForCausalLM.of(model)
    assert all(x is y for x, y in zip(hf.parameters(), model.parameters(), strict=True))
    assert not model.embedding.weight.requires_grad and model.norm.weight.requires_grad
    assert hf.training and HFRamNetForCausalLM.of(model.eval()).training is False


def test_weights_of_other_shapes_are_refused_or_drawn(tmp_path: Path) -> None:
    _, hf = both()
    hf.save_pretrained(tmp_path)
    with pytest.raises(RuntimeError, match="ignore_mismatched_sizes"):
        AutoModelForCausalLM.from_pretrained(tmp_path, vocab_size=20)
    again = AutoModelForCausalLM.from_pretrained(tmp_path, vocab_size=20, ignore_mismatched_sizes=True)
    assert again(IDS + 9).logits.shape == (2, 9, 20) and torch.isfinite(again(IDS + 9).logits).all()


def test_weights_on_the_cpu_serve_another_device() -> None:
    model, hf = both()
    cpu_offload(hf, execution_device=torch.device("cpu"))
    assert torch.equal(hf.generate(IDS, max_new_tokens=3), model.generate(IDS, 3))


@pytest.mark.parametrize("options", [{"num_beams": 2, "do_sample": True}, {"repetition_penalty": 1.5}, {"min_p": 0.1}])
def test_other_ways_to_generate_do_not_depend_on_the_cache(options: dict) -> None:
    _, hf = both()
    written = []
    for use_cache in (True, False):
        torch.manual_seed(0)
        written.append(hf.generate(IDS, max_new_tokens=6, use_cache=use_cache, **options))
    assert torch.equal(*written)


def test_a_streamer_prints_what_is_generated(capsys: pytest.CaptureFixture) -> None:
    model, hf = both(vocab_size=256)
    tokenizer = byte_tokenizer()
    hf.generate(tokenizer("ab", return_tensors="pt")["input_ids"], max_new_tokens=4, streamer=TextStreamer(tokenizer))
    written = bytes(model.generate(torch.tensor([list(b"ab")]), 4)[0].tolist())
    assert capsys.readouterr().out == written.decode(errors="replace") + "\n"


def test_generation_starts_from_a_first_token() -> None:
    _, hf = both()
    assert torch.equal(
        hf.generate(bos_token_id=3, max_new_tokens=4), hf.generate(torch.tensor([[3]]), max_new_tokens=4)
    )


def test_a_checkpoint_of_this_projects_own_format_is_named(tmp_path: Path) -> None:
    small_model().save_pretrained(tmp_path)
    with pytest.raises(ValueError, match=r"^address_bias is given, .*; ramnet\.hf\.convert converts"):
        HFRamNetForCausalLM.from_pretrained(tmp_path)
    with pytest.raises(ValueError, match="model_type"):
        AutoModelForCausalLM.from_pretrained(tmp_path)


def test_transformers_that_is_missing_is_named_with_the_line_that_installs_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ImportError, match=r"^ramnet\.hf needs transformers: pip install 'ramnet\[hf\]'$"):
        runpy.run_path(ramnet.hf.__file__)
