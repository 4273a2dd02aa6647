"""``model(ids, labels=…)``: the cross entropy of the next token, computed for a few tokens at a time."""

from __future__ import annotations

import itertools
from typing import Any

import pytest
import torch
from torch import Tensor

from ramnet import RamNetForCausalLM
from tests.ramnet.test_model import small_model, tokens
from tests.samples import LargestTensor, relative_rmse


def plain_loss(model: RamNetForCausalLM, ids: Tensor, labels: Tensor) -> Tensor:
    """Compute the loss token by token: −log softmax of the previous logits at each label that is not ignored."""
    log_probability = model(ids).logits.log_softmax(-1)
    nats = [
        -log_probability[row, at - 1, label]
        for row in range(ids.shape[0])
        for at, label in enumerate(labels[row].tolist())
        if at > 0 and label != -100
    ]
    return torch.stack(nats).mean()


def with_gradients(model: RamNetForCausalLM, loss: Tensor) -> list[Tensor]:
    model.zero_grad()
    loss.backward()
    return [loss.detach(), *(x.grad.clone() for x in model.parameters() if x.grad is not None)]


def some_ignored(ids: Tensor) -> Tensor:
    return ids.where(torch.rand(ids.shape, generator=torch.Generator().manual_seed(3)) < 0.6, -100)


@pytest.mark.parametrize("tokens_at_once", [1, 4, 5, 100])
@pytest.mark.parametrize("tie_embeddings", [False, True])
def test_it_equals_the_definition_with_its_gradients_for_any_chunk_size(
    kernels: str, monkeypatch: pytest.MonkeyPatch, tokens_at_once: int, tie_embeddings: bool
) -> None:
    monkeypatch.setattr("ramnet.loss.LOGITS_AT_ONCE", 11 * tokens_at_once)
    model, ids = small_model(tie_embeddings=tie_embeddings).double(), tokens(2, 9)
    labels = some_ignored(ids)
    actual = with_gradients(model, model(ids, labels=labels).loss)
    expected = with_gradients(model, plain_loss(model, ids, labels))
    assert len(actual) == len(expected) > 10
    assert all(relative_rmse(a, e) <= 1e-12 for a, e in zip(actual, expected, strict=True))


def test_a_random_head_is_recomputed_with_the_same_random_numbers(monkeypatch: pytest.MonkeyPatch) -> None:
    """The head has dropout, as an adapter may, and is recomputed in the backward."""
    monkeypatch.setattr("ramnet.loss.LOGITS_AT_ONCE", 4 * 11)
    model, ids = small_model().double(), tokens(2, 9)
    model.head = torch.nn.Sequential(torch.nn.Dropout(0.5), model.head).train()

    def loss() -> Tensor:
        torch.manual_seed(0)
        return model(ids, labels=ids).loss

    before = loss()
    (gradient,) = torch.autograd.grad(before, [model.norm.bias])
    with torch.no_grad():
        model.norm.bias += 1e-6
        assert float(gradient.sum()) == pytest.approx(float(loss() - before) / 1e-6, rel=1e-4)


@pytest.mark.parametrize("gradients", [True, False])
def test_the_logits_of_a_long_batch_are_never_all_in_memory(monkeypatch: pytest.MonkeyPatch, gradients: bool) -> None:
    monkeypatch.setattr("ramnet.loss.LOGITS_AT_ONCE", 50_000)
    model, ids = small_model(vocab_size=1000), tokens(3, 100)
    with LargestTensor() as seen, torch.set_grad_enabled(gradients):
        out = model(ids, labels=ids)
        if gradients:
            out.loss.backward()
    assert out.logits.shape == (3, 0, 1000)
    assert 40_000 < seen.numbers <= 50_000, "the whole logits are 300 000 numbers"
    assert relative_rmse(out.loss, plain_loss(model, ids, ids)) < 1e-5


@pytest.mark.parametrize(("kept", "length"), [(0, 7), (3, 3), (9, 7)])
def test_logits_that_are_asked_for_come_with_the_loss(kept: int, length: int) -> None:
    model, ids = small_model(), tokens(2, 7)
    out = model(ids, labels=ids, logits_to_keep=kept)
    assert relative_rmse(out.logits, model(ids).logits[:, -length:]) <= 1e-6
    assert relative_rmse(out.loss, plain_loss(model, ids, ids)) < 1e-5
    assert model(ids).loss is None


def test_labels_may_be_int32_and_weights_bfloat16() -> None:
    model, ids = small_model().to(torch.bfloat16), tokens(2, 30)
    exact = float(plain_loss(small_model().to(torch.bfloat16).float(), ids, ids).detach())
    loss = model(ids, labels=ids.int()).loss.detach()
    assert loss.dtype == torch.float32
    assert float(loss) == pytest.approx(exact, rel=0.01)


@pytest.mark.parametrize("length", [0, 1])
def test_the_loss_is_nan_if_all_labels_are_ignored(length: int) -> None:
    ids = tokens(2, length)
    assert small_model()(ids, labels=ids).loss.isnan()
    ids = tokens(2, 5)
    assert small_model()(ids, labels=torch.full_like(ids, -100)).loss.isnan()


@pytest.mark.parametrize(
    ("labels", "error", "message"),
    [
        (tokens(2, 6), ValueError, r"labels has shape \[2, 6\]; it must be that of input_ids, \[2, 7\]"),
        (tokens(2, 7) + 5, ValueError, r"labels holds 1[1-5]; token ids must be in 0\.\.10"),
        (tokens(2, 7) - 101, ValueError, r"labels holds -10\d; token ids"),
        (tokens(2, 7).float(), TypeError, r"labels is torch\.float32; it must be torch\.int64"),
    ],
)
def test_bad_labels_are_refused_before_the_model_runs(
    monkeypatch: pytest.MonkeyPatch, labels: Tensor, error: type[Exception], message: str
) -> None:
    def never(*arguments: Any, **named: Any) -> None:
        raise AssertionError("the model ran")

    model = small_model()
    monkeypatch.setattr(model, "hidden_states", never)
    with pytest.raises(error, match=message):
        model(tokens(2, 7), labels=labels)


@pytest.mark.parametrize("tokens_at_once", [4, 100])
def test_the_loss_is_part_of_a_compiled_graph(monkeypatch: pytest.MonkeyPatch, tokens_at_once: int) -> None:
    monkeypatch.setattr("ramnet.loss.LOGITS_AT_ONCE", 11 * tokens_at_once)
    model, ids = small_model(), tokens(2, 9)
    compiled = torch.compile(lambda ids: model(ids, labels=ids).loss, fullgraph=True, backend="aot_eager")
    actual = with_gradients(model, compiled(ids))
    expected = with_gradients(model, plain_loss(model, ids, ids))
    assert all(relative_rmse(a, e) < 1e-4 for a, e in zip(actual, expected, strict=True))


def test_padding_is_neither_predicted_nor_predicts(kernels: str) -> None:
    model, ids = small_model().double(), tokens(3, 9)
    mask = torch.ones(3, 9, dtype=torch.bool)
    mask[0, 6:] = mask[1, :4] = mask[2, 2:4] = mask[2, 6] = False  # right, left and in between
    rows = [ids[row, mask[row]][None] for row in range(3)]
    nats = [model(row, labels=row).loss * (row.shape[1] - 1) for row in rows]
    expected = sum(nats) / sum(row.shape[1] - 1 for row in rows)
    assert relative_rmse(model(ids, attention_mask=mask, labels=ids).loss, expected) <= 1e-12


@pytest.mark.parametrize("starts", [[0, 4, 9], [0, 1, 3, 9], [0, 0, 5, 5, 9], [0, 9, 9], [0, 9]])
def test_a_documents_first_token_is_not_predicted_from_the_document_before(kernels: str, starts: list[int]) -> None:
    model, ids = small_model().double(), tokens(1, 9)
    documents = [ids[:, a:b] for a, b in itertools.pairwise(starts) if b - a > 1]
    nats = [model(each, labels=each).loss * (each.shape[1] - 1) for each in documents]
    expected = sum(nats) / sum(each.shape[1] - 1 for each in documents)
    actual = model(ids, cu_seqlens=torch.tensor(starts, dtype=torch.int32), labels=ids).loss
    assert relative_rmse(actual, expected) <= 1e-12
