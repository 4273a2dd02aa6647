"""transformers' ``generate`` on the fixed-size state: the same tokens as this project's, and as without a cache."""

from __future__ import annotations

import pytest
import torch

pytest.importorskip("transformers", reason="ramnet.hf needs transformers: pip install 'ramnet[hf]'")

from transformers import pipeline

from ramnet.hf import HFRamNetCache, byte_tokenizer
from tests.ramnet.hf.models import both
from tests.ramnet.test_model import assert_states_match, tokens
from tests.samples import relative_rmse

IDS = tokens(2, 9)
PADDING = torch.tensor([[1] * 9, [0, 0, 0, 0, 1, 1, 1, 1, 1]])


@pytest.mark.parametrize("beams", [1, 3])
def test_greedy_and_beams_find_what_the_models_own_search_does(beams: int) -> None:
    model, hf = both()
    expected = model.generate(IDS, 6, num_beams=beams)
    for use_cache in (True, False):
        assert torch.equal(hf.generate(IDS, max_new_tokens=6, num_beams=beams, use_cache=use_cache), expected)


@pytest.mark.parametrize("options", [{}, {"num_beams": 3}, {"prefill_chunk_size": 2}, {"use_cache": False}])
def test_a_left_padded_row_generates_what_it_does_alone(options: dict) -> None:
    _, hf = both()
    out = hf.generate(IDS, attention_mask=PADDING, max_new_tokens=6, **options)
    alone = hf.generate(IDS[1:, 4:], max_new_tokens=6)
    if "num_beams" in options:
        alone = hf.generate(IDS[1:, 4:], max_new_tokens=6, num_beams=3)
    assert torch.equal(out[1, 9:], alone[0, 5:])


def test_samples_have_the_models_distribution() -> None:
    model, hf = both()
    torch.manual_seed(0)
    drawn = hf.generate(IDS[:1], max_new_tokens=1, do_sample=True, top_k=0, temperature=0.7, num_return_sequences=1000)
    shares = torch.bincount(drawn[:, -1], minlength=11) / 1000
    expected = (model(IDS[:1]).logits[0, -1] / 0.7).softmax(-1)
    assert (shares - expected).abs().max().item() < 0.064  # four standard errors at a share of one half


def test_scores_of_each_step_are_the_logits_of_the_whole_sequence() -> None:
    _, hf = both()
    out = hf.generate(IDS, max_new_tokens=5, return_dict_in_generate=True, output_logits=True)
    whole = hf(out.sequences)
    assert relative_rmse(torch.stack(out.logits, 1), whole.logits[:, 8:-1]) < 1e-5
    hf(out.sequences[:, -1:], cache=out.cache)  # the last token was not read
    assert_states_match(out.cache.state, whole.cache.state)


def test_generation_continues_from_the_cache_of_an_earlier_call() -> None:
    _, hf = both()
    expected = hf.generate(IDS, attention_mask=PADDING, max_new_tokens=8)
    first = hf.generate(IDS, attention_mask=PADDING, max_new_tokens=3, return_dict_in_generate=True)
    mask = torch.cat([PADDING, torch.ones(2, 3, dtype=torch.int64)], 1)
    second = hf.generate(first.sequences, attention_mask=mask, cache=first.cache, max_new_tokens=5)
    assert torch.equal(second, expected)
    with pytest.raises(
        ValueError, match="input_ids has 2 columns, of which the cache has read 16; give the tokens aft"
    ):
        hf.generate(IDS[:, :2], cache=first.cache, max_new_tokens=1)


@pytest.mark.parametrize("columns", [2, 11])
def test_a_turn_shorter_than_what_the_cache_has_read_is_refused(columns: int) -> None:
    _, hf = both()
    cache = hf.generate(IDS, max_new_tokens=6, return_dict_in_generate=True).cache
    assert cache.columns == 14
    with pytest.raises(ValueError, match=f"input_ids has {columns} columns, of which the cache has read 14; give the"):
        hf.generate(tokens(2, columns), cache=cache, max_new_tokens=1)


def test_a_prompt_that_ends_in_padding_and_a_cache_that_is_not_to_be_used_are_refused() -> None:
    _, hf = both()
    with pytest.raises(ValueError, match="attention_mask ends in padding in row 1; pad on the left"):
        hf.generate(IDS, attention_mask=PADDING.flip(1), max_new_tokens=1)
    with pytest.raises(ValueError, match="a cache is given but use_cache is False"):
        hf.generate(IDS, cache=HFRamNetCache(), use_cache=False, max_new_tokens=1)
    with pytest.raises(ValueError, match=r"^input_ids has shape \[2, 0\]; a prompt needs a token$"):
        hf.generate(IDS[:, :0], max_new_tokens=1)


def test_generation_continues_from_a_state() -> None:
    model, hf = both()
    state = model(IDS[:, :6]).state
    expected = hf.generate(IDS, max_new_tokens=4)
    out = hf.generate(IDS[:, 6:], cache=HFRamNetCache(state), max_new_tokens=4)
    assert torch.equal(out[:, 3:], expected[:, 9:])


def test_generation_continues_embeddings() -> None:
    model, hf = both()
    out = hf.generate(inputs_embeds=model.embedding(IDS), attention_mask=PADDING, max_new_tokens=6)
    assert torch.equal(out, hf.generate(IDS, attention_mask=PADDING, max_new_tokens=6)[:, 9:])


def test_a_row_stops_at_its_end_token() -> None:
    _, hf = both()
    free = hf.generate(IDS, max_new_tokens=6)
    stop = int(free[0, 11])
    options = {"attention_mask": torch.ones_like(IDS), "eos_token_id": stop, "pad_token_id": 0}
    stopped = hf.generate(IDS, max_new_tokens=6, **options)[0, 9:].tolist()
    end = stopped.index(stop) + 1
    assert stopped[:end] == free[0, 9 : 9 + end].tolist() and set(stopped[end:]) <= {0}


def test_drafts_of_an_assistant_are_refused() -> None:
    _, hf = both()
    with pytest.raises(ValueError, match="assisted generation is not supported with stateful models"):
        hf.generate(IDS[:1], assistant_model=both()[1], max_new_tokens=2)


def test_a_pipeline_continues_texts() -> None:
    model, hf = both(vocab_size=256)
    texts = ["def ", "größer als", "a"]
    written = pipeline("text-generation", model=hf, tokenizer=byte_tokenizer())(
        texts, max_new_tokens=5, do_sample=False, batch_size=3
    )
    for text, (out,) in zip(texts, written, strict=True):
        ids = model.generate(torch.tensor([list(text.encode())]), 5)[0].tolist()
        assert out["generated_text"] == bytes(ids).replace(b"\0", b"").decode(errors="replace")


@pytest.mark.parametrize("text", ["naïve\n\t<0x00>Ā🙂", "\0", ""])
def test_the_byte_tokenizers_ids_are_the_bytes_of_utf8(text: str) -> None:
    tokenizer = byte_tokenizer()
    assert len(tokenizer) == 256
    assert tokenizer(text)["input_ids"] == list(text.encode())
    assert tokenizer.decode(tokenizer(text)["input_ids"]) == text


def test_the_byte_tokenizer_pads_on_the_left() -> None:
    assert byte_tokenizer()(["ab", "c"], padding=True)["input_ids"] == [[97, 98], [0, 99]]
