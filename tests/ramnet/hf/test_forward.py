"""The model of transformers computes what ``RamNetForCausalLM`` does: logits, losses, caches, masks, hidden states."""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from torch import Tensor

pytest.importorskip("transformers", reason="ramnet.hf needs transformers: pip install 'ramnet[hf]'")

from ramnet import RamNetForCausalLM, RamState
from ramnet.hf import HFRamNetCache, HFRamNetConfig, HFRamNetForCausalLM
from tests.ramnet.hf.models import both
from tests.ramnet.test_model import SMALL, assert_states_match, tokens
from tests.samples import relative_rmse

IDS = tokens(2, 9)
PADDING = torch.tensor([[1] * 9, [0, 0, 0, 0, 1, 1, 1, 1, 1]])


def test_logits_states_and_losses_are_the_models() -> None:
    model, hf = both()
    expected, actual = model(IDS, labels=IDS, logits_to_keep=0), hf(IDS, labels=IDS)
    assert torch.equal(actual.logits, expected.logits) and torch.equal(actual.loss, expected.loss)
    assert_states_match(actual.cache.state, expected.state, tolerance=0)
    loss, logits, cache = hf(IDS, labels=IDS, return_dict=False)
    assert torch.equal(loss, expected.loss) and torch.equal(logits, expected.logits)
    assert isinstance(cache, HFRamNetCache)
    assert hf(IDS, use_cache=False).cache is None
    assert hf.train()(IDS).cache is None


@pytest.mark.parametrize("kept", [2, torch.tensor([0, 5])])
def test_the_logits_that_are_asked_for_are_returned(kept: int | Tensor) -> None:
    _, hf = both()
    positions = slice(-kept, None) if isinstance(kept, int) else kept
    expected = hf(IDS).logits[:, positions]
    assert relative_rmse(hf(IDS, logits_to_keep=kept).logits, expected) < 1e-6
    assert relative_rmse(hf.train()(IDS, labels=IDS, logits_to_keep=kept).logits, expected) < 1e-6
    assert hf(IDS, labels=IDS).logits is None  # in training, all logits at once would need the most memory of all


def test_the_loss_of_accumulated_batches_is_divided_by_all_their_labels() -> None:
    _, hf = both()
    labels = IDS.masked_fill(PADDING == 0, -100)
    parts = [hf(IDS[row : row + 1], labels=labels[row : row + 1], num_items_in_batch=13).loss for row in (0, 1)]
    assert int((labels[:, 1:] != -100).sum()) == 13
    assert sum(parts).item() == pytest.approx(hf(IDS, labels=labels).loss.item(), rel=1e-6)
    ignored = hf(IDS, labels=torch.full_like(IDS, -100), num_items_in_batch=13).loss
    assert ignored.item() == 0


@pytest.mark.parametrize("marked", [False, True])
def test_labels_that_trainer_counts_but_the_loss_ignores_do_not_make_it_smaller(marked: bool) -> None:
    """Those of padding, if they are not −100, and that of the first token after padding on the left."""
    _, hf = both()
    labels = IDS.masked_fill(PADDING == 0, -100) if marked else IDS
    counted = int((labels[:, 1:] != -100).sum())
    plain = hf(IDS, attention_mask=PADDING, labels=labels).loss
    asked = hf(IDS, attention_mask=PADDING, labels=labels, num_items_in_batch=counted).loss
    twice = hf(IDS, attention_mask=PADDING, labels=labels, num_items_in_batch=2 * counted).loss
    assert asked.item() == pytest.approx(plain.item(), rel=1e-6)
    assert twice.item() == pytest.approx(plain.item() / 2, rel=1e-6)


@pytest.mark.parametrize("kind", [torch.float32, torch.bfloat16])
def test_a_floating_mask_of_zeros_and_ones_is_a_mask(kind: torch.dtype) -> None:
    _, hf = both()
    assert torch.equal(hf(IDS, attention_mask=PADDING.to(kind)).logits, hf(IDS, attention_mask=PADDING).logits)
    with pytest.raises(TypeError, match="attention_mask is torch"):
        hf(IDS, attention_mask=PADDING.to(kind) - 1)


@pytest.mark.parametrize("change", [lambda cache: None, lambda cache: cache.reorder_cache(torch.tensor([1, 0, 1]))])
def test_a_mask_that_denies_what_the_cache_has_read_is_refused(change: Callable[[HFRamNetCache], None]) -> None:
    _, hf = both()
    cache = hf(IDS[:, :6], attention_mask=PADDING[:, :6]).cache
    change(cache)
    rows = torch.tensor([1, 0, 1] if cache.batch_size == 3 else [0, 1])
    for row, column, message in ((rows.tolist().index(0), 2, "0, but the cache has read a token there"),
                                 (rows.tolist().index(1), 1, "1, but the cache has read padding there")):  # fmt: skip
        mask = PADDING[rows]
        mask[row, column] = 1 - mask[row, column]
        with pytest.raises(ValueError, match=rf"^attention_mask\[{row}, {column}\] is {message}"):
            hf(IDS[rows, 6:], cache=cache, attention_mask=mask)
    assert cache.columns == 6
    hf(IDS[rows, 6:], cache=cache, attention_mask=PADDING[rows])


def test_a_mask_that_is_longer_than_cache_and_input_is_refused() -> None:
    _, hf = both()
    with pytest.raises(ValueError, match=r"attention_mask has shape \[2, 9\]; it must be \[2, 6\]"):
        hf(IDS[:, :6], attention_mask=PADDING)
    cache = hf(IDS[:, :5]).cache
    with pytest.raises(
        ValueError, match="attention_mask has 6 columns before those of the input; the cache has read 5"
    ):
        hf(IDS[:, 6:], cache=cache, attention_mask=torch.ones_like(IDS))


@pytest.mark.parametrize("side", ["left", "right", "both"])
def test_padding_changes_nothing(side: str) -> None:
    _, hf = both()
    columns = {"left": range(4, 9), "right": range(5), "both": range(2, 7)}[side]
    mask = torch.ones_like(IDS)
    mask[1] = 0
    mask[1, columns] = 1
    padded, alone = hf(IDS, attention_mask=mask), hf(IDS[1:, columns])
    assert relative_rmse(padded.logits[1:, columns], alone.logits) < 1e-5
    assert_states_match(padded.cache.state.split()[1], alone.cache.state)
    both_losses = hf(IDS, attention_mask=mask, labels=IDS).loss * (8 + 4)
    one = hf(IDS[:1], labels=IDS[:1]).loss * 8 + hf(IDS[1:, columns], labels=IDS[1:, columns]).loss * 4
    assert both_losses.item() == pytest.approx(one.item(), rel=1e-5)


def test_a_cache_continues_the_sequence_also_with_a_mask_of_all_columns() -> None:
    _, hf = both()
    whole = hf(IDS, attention_mask=PADDING)
    with torch.no_grad():
        cache = hf(IDS[:, :6], attention_mask=PADDING[:, :6]).cache
        second = hf(IDS[:, 6:8], cache=cache, attention_mask=PADDING[:, :8])
        kept = cache.state.memory[0].data_ptr()
        third = hf(IDS[:, 8:], cache=cache)
    assert second.cache is cache and third.cache is cache and cache.columns == cache.get_seq_length() == 9
    assert cache.state.memory[0].data_ptr() == kept  # a token updates the state in place
    assert relative_rmse(torch.cat([second.logits, third.logits], 1), whole.logits[:, 6:]) < 1e-5
    assert_states_match(cache.state, whole.cache.state)


def test_a_cache_is_reordered_repeated_and_reset_but_not_cut() -> None:
    _, hf = both()
    cache = hf(IDS).cache
    rows = cache.state
    assert cache.batch_size == 2 and len(cache) == SMALL.num_layers and cache.has_previous_state()
    cache.reorder_cache(torch.tensor([1, 1, 0]))
    assert_states_match(cache.state, rows.reorder(torch.tensor([1, 1, 0])), tolerance=0)
    cache.batch_repeat_interleave(2)
    assert_states_match(cache.state, rows.reorder(torch.tensor([1, 1, 1, 1, 0, 0])), tolerance=0)
    cache.crop(0)
    with pytest.raises(ValueError, match="tokens_to_remove is 2; a RAM-Net's state cannot forget its last tokens"):
        cache.crop(2)
    cache.reset()
    assert torch.equal(hf(IDS, cache=cache).logits, hf(IDS).logits)
    assert bool(HFRamNetCache()) and HFRamNetCache().batch_size == -1


def test_packed_documents_are_computed_alone() -> None:
    _, hf = both()
    bounds = torch.tensor([0, 4, 9], dtype=torch.int32)
    position_ids = torch.tensor([[*range(4), *range(5)]])
    packed = hf(IDS[:1], labels=IDS[:1], cu_seq_lens_q=bounds, position_ids=position_ids, max_length_q=5)
    first, second = (hf(IDS[:1, part], labels=IDS[:1, part]) for part in (slice(0, 4), slice(4, 9)))
    assert relative_rmse(packed.logits, torch.cat([first.logits, second.logits], 1)) < 1e-5
    assert packed.loss.item() * 7 == pytest.approx(first.loss.item() * 3 + second.loss.item() * 4, rel=1e-5)


def test_embeddings_may_be_given_instead_of_ids() -> None:
    _, hf = both()
    embeds = hf.get_input_embeddings()(IDS).detach().requires_grad_()
    out = hf(inputs_embeds=embeds, attention_mask=PADDING, labels=IDS)
    expected = hf(IDS, attention_mask=PADDING, labels=IDS)
    assert torch.equal(out.logits, expected.logits) and torch.equal(out.loss, expected.loss)
    out.loss.backward()
    assert float(embeds.grad.abs().sum()) > 0


def test_hidden_states_are_the_blocks_inputs_and_the_heads() -> None:
    model, hf = both()
    hidden = hf(IDS, output_hidden_states=True).hidden_states
    assert len(hidden) == hf.config.num_hidden_layers + 1 == SMALL.conv_layers + SMALL.num_layers + 1
    assert torch.equal(hidden[0], model.embedding(IDS))
    assert torch.equal(hidden[-1], model.hidden_states(IDS)[0])
    assert torch.equal(model.norm(model.blocks[-1](hidden[-2], *_state_of_last_layer(model))[0]), hidden[-1])
    assert hf(IDS).hidden_states is None
    hf.config.output_hidden_states = True
    assert len(hf(IDS).hidden_states) == len(hidden)


def test_hidden_states_are_those_of_the_call_and_of_no_other_thread() -> None:
    _, hf = both()

    def shapes(ids: Tensor) -> list[torch.Size]:
        return [x.shape for x in hf(ids, output_hidden_states=True).hidden_states]

    inputs = [IDS, IDS[:1, :5]] * 20
    with ThreadPoolExecutor(4) as pool:
        assert list(pool.map(shapes, inputs)) == [shapes(ids) for ids in inputs]


def _state_of_last_layer(model: torch.nn.Module) -> tuple[Tensor, Tensor, Tensor, bool]:
    state = RamState.zeros(model.config, 2)
    return state.memory[-1], state.mass[-1], state.position, False


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({}, "neither input_ids nor inputs_embeds is given; give one of them"),
        ({"input_ids": IDS, "inputs_embeds": torch.zeros(2, 9, 12)}, "input_ids and inputs_embeds are both given"),
        ({"input_ids": IDS, "position_ids": IDS}, "position_ids is given, but a RAM-Net counts positions itself"),
        ({"input_ids": IDS, "seq_idx": IDS}, "seq_idx is given, but a RAM-Net counts positions itself"),
        ({"input_ids": IDS, "state": 1}, r"state is given, which .* not take; give cache=HFRamNetCache\(state\)$"),
        ({"input_ids": IDS, "cu_seqlens": IDS}, "cu_seqlens is given, which .* not take; give cu_seq_lens_q$"),
        ({"input_ids": IDS, "in_place": True}, "in_place is given, which .* not take; omit it"),
        ({"input_ids": IDS + 9}, "input_ids holds 19; token ids must be in 0..10"),
        ({"input_ids": IDS, "labels": IDS + 9}, "labels holds 19; token ids must be in 0..10"),
        ({"input_ids": IDS, "attention_mask": PADDING[:, 1:]}, r"attention_mask has shape \[2, 8\]"),
        ({"input_ids": IDS[0]}, r"input_ids has shape \[9\]; it must be \[B, T\]$"),
        ({"inputs_embeds": torch.zeros(9, 12)}, r"inputs_embeds has shape \[9, 12\]; it must be \[B, T, C\]$"),
    ],
)  # fmt: skip
def test_arguments_that_do_not_fit_are_named(arguments: dict, message: str) -> None:
    _, hf = both()
    with pytest.raises(ValueError, match=f"^{message}"):
        hf(**arguments)


def test_a_configuration_that_is_not_a_ramnets_is_named() -> None:
    with pytest.raises(ValueError, match=r"^the field ramnet is not a RamNetConfig: top_k = -1: "):
        HFRamNetConfig(ramnet={**SMALL.model_dump(mode="json"), "top_k": -1})


def test_initial_weights_are_drawn_once_as_the_models_are() -> None:
    torch.manual_seed(3)
    expected, following = RamNetForCausalLM(SMALL), torch.rand(1)
    torch.manual_seed(3)
    actual = HFRamNetForCausalLM(HFRamNetConfig(ramnet=SMALL))
    assert all(torch.equal(x, y) for x, y in zip(actual.parameters(), expected.parameters(), strict=True))
    assert torch.equal(torch.rand(1), following)


@pytest.mark.parametrize("tied", [False, True])
def test_the_vocabulary_is_resized_and_what_was_known_stays(tied: bool) -> None:
    _, hf = both(tie_embeddings=tied, embedding_std=0.1)
    before = hf(IDS).logits
    hf.resize_token_embeddings(14, mean_resizing=False)
    assert hf.get_input_embeddings().weight[11:].std().item() == pytest.approx(0.1, abs=0.05)
    ids = torch.full((1, 3), 13)
    assert relative_rmse(hf(IDS).logits[..., :11], before) < 1e-6
    assert hf(ids, labels=ids).logits.shape == (1, 3, 14)
    assert (hf.get_input_embeddings().weight is hf.get_output_embeddings().weight) == tied
    assert hf.config.ramnet == hf.ramnet.config and hf.config.vocab_size == 14


@pytest.mark.parametrize("name", ["past_key_values", "cache_params"])
def test_a_cache_by_the_name_of_other_models_is_used_or_refused(name: str) -> None:
    _, hf = both()
    whole = hf(IDS).logits[:, 6:]
    cache, other = hf(IDS[:, :6]).cache, hf(IDS[:, :5]).cache
    with pytest.raises(ValueError, match=f"^cache and {name} are different caches; give one of them$"):
        hf(IDS[:, 6:], cache=other, **{name: cache})
    with pytest.raises(TypeError, match=f"^{name} is a tuple; a RAM-Net goes on from the cache of an output$"):
        hf(IDS[:, 6:], **{name: ()})
    assert relative_rmse(hf(IDS[:, 6:], **{name: cache}).logits, whole) < 1e-5
