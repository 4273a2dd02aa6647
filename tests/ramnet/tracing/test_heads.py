"""One head of a trace: shares, ages, and rows without their padding."""

from __future__ import annotations

import pytest
import torch

import ramnet
from ramnet.tracing.heads import heads_of
from tests.ramnet.test_masks import LENGTH, MASK
from tests.ramnet.test_model import small_model, tokens


def test_shares_of_a_read_add_up() -> None:
    heads = heads_of(ramnet.trace(small_model(), tokens(1, LENGTH)), most=LENGTH)
    for head in heads:
        torch.testing.assert_close(head.shares.sum(-1) + head.before, torch.ones(LENGTH))
        assert 0 < float(head.ages.sum()) <= 1.000001


def test_heads_say_where_they_are_and_whether_they_move() -> None:
    model = small_model()
    trace = ramnet.trace(model, tokens(1, 3))
    found = [(head.layer, head.head, head.moves) for head in heads_of(trace)]
    assert found == [(i + 1, h + 1, h < model.config.cape_heads(i)) for i in range(3) for h in range(3)]
    assert [head.name for head in heads_of(trace, layers=[3], heads=[1, 3])] == ["Layer 3, head 1", "Layer 3, head 3"]


def test_a_padded_row_is_shown_as_the_row_alone() -> None:
    model, ids = small_model(), tokens(len(MASK), LENGTH)
    trace = ramnet.trace(model, ids, attention_mask=MASK)
    for row, mask in enumerate(MASK[:-1].bool()):
        alone = heads_of(ramnet.trace(model, ids[row : row + 1, mask]))
        for head, exact in zip(heads_of(trace, row), alone, strict=True):
            n = exact.shares.shape[1]
            read = exact.shares > 0
            assert torch.equal(head.sources[:, :n][read], exact.sources[read]) and not head.shares[:, n:].any()
            for name in ("written", "read", "before", "ages"):
                torch.testing.assert_close(getattr(head, name), getattr(exact, name))
            torch.testing.assert_close((*head.accesses, head.shares[:, :n]), (*exact.accesses, exact.shares))
    with pytest.raises(ValueError, match=r"^row 5 holds no token, only padding$"):
        heads_of(trace, 5)


def test_the_median_age_is_of_all_that_is_read() -> None:
    head = heads_of(ramnet.trace(small_model(), tokens(1, 4)))[0]
    for ages, median in (([0.1, 0.3, 0.2, 0.4], 2), ([0.5, 0.0, 0.0, 0.0], 0), ([0.2, 0.2, 0.0, 0.0], None)):
        assert head._replace(ages=torch.tensor(ages)).median_age() == median


@pytest.mark.parametrize(
    ("chosen", "message"),
    [
        ({"layers": [4]}, "layer 4 is not there; there are layers 1..3"),
        ({"heads": [0]}, "head 0 is not there; there are heads 1..3"),
    ],
)
def test_a_head_that_is_not_there_is_named(chosen: dict[str, list[int]], message: str) -> None:
    with pytest.raises(ValueError, match=f"^{message}$"):
        heads_of(ramnet.trace(small_model(), tokens(1, 2)), **chosen)


def test_a_head_is_one_of_the_chosen_layers() -> None:
    config = ramnet.RamNetConfig.preset("tiny", num_layers=2, num_heads=(4, 8), cape_full_layers=0)
    trace = ramnet.trace(ramnet.RamNetForCausalLM(config), tokens(1, 2))
    assert [(head.layer, head.head) for head in heads_of(trace, heads=[8])] == [(2, 8)]
    with pytest.raises(ValueError, match=r"^head 5 is not there; there are heads 1\.\.4$"):
        heads_of(trace, layers=[1], heads=[5])
