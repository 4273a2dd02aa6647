"""How a step is computed does not change what is computed."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from ramnet.baselines import BaselineConfig
from ramnet.training import Recipe, train
from ramnet.training.batch import EVALUATED
from ramnet.training.model import Model, make
from ramnet.training.mqar import HELD_OUT_EXAMPLES
from ramnet.training.objective import Execution
from tests.ramnet.training.runs import RECIPE, TASK, fresh

ATTENTION = BaselineConfig(
    mixer="attention", vocab_size=64, hidden_size=16, num_layers=2, num_heads=2, key_dim=8, value_dim=8
)


def first_gradients(monkeypatch: pytest.MonkeyPatch, model: Model, execution: Execution) -> tuple[float, list[Tensor]]:
    """Return the loss and the gradients, before clipping, of the first step."""
    found: list[Tensor] = []

    def clip(parameters: Any, _: float) -> Tensor:
        found.extend(parameter.grad.clone() for parameter in parameters)
        return torch.tensor(1.0)

    monkeypatch.setattr("torch.nn.utils.clip_grad_norm_", clip)
    result = train(model, TASK, RECIPE.model_copy(update={"steps": 1}), execution=execution)
    return result.losses[0], found


@pytest.mark.parametrize("make_model", [fresh, lambda: make(ATTENTION)], ids=["ramnet", "baseline"])
@pytest.mark.parametrize("micro_batch", [1, 3])
def test_a_batch_in_parts_has_the_loss_and_gradients_of_the_whole(
    monkeypatch: pytest.MonkeyPatch, make_model: Callable[[], Model], micro_batch: int
) -> None:
    losses, gradients = [], []
    for rows in (None, micro_batch):
        torch.manual_seed(0)
        loss, found = first_gradients(monkeypatch, make_model(), Execution(micro_batch=rows))
        losses.append(loss)
        gradients.append(found)
    assert losses[1] == pytest.approx(losses[0], rel=1e-6)
    assert len(gradients[0]) > 5
    for whole, parts in zip(*gradients, strict=True):
        torch.testing.assert_close(parts, whole, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("make_model", [fresh, lambda: make(ATTENTION)], ids=["ramnet", "baseline"])
def test_recomputed_activations_give_the_same_gradients(
    kernels: str, monkeypatch: pytest.MonkeyPatch, make_model: Callable[[], Model]
) -> None:
    found = []
    for recompute in (False, True):
        torch.manual_seed(0)
        model = make_model()
        calls: list[str] = []
        model.blocks[0].mixer.register_forward_pre_hook(lambda *_, calls=calls: calls.append("forward"))
        found.append(first_gradients(monkeypatch, model, Execution(recompute=recompute)))
        evaluations = -(-HELD_OUT_EXAMPLES // (EVALUATED // TASK.length))
        assert len(calls) - evaluations == (2 if recompute else 1)
        assert "forward" not in vars(model.blocks[0])
    (loss, gradients), (loss_again, again) = found
    assert loss == loss_again
    assert all(torch.equal(x, y) for x, y in zip(gradients, again, strict=True))


def test_bfloat16_trains_float32_weights(kernels: str) -> None:
    model, recipe = fresh(), Recipe(steps=30, batch_size=16, warmup_steps=5, precision="bfloat16")
    products: set[torch.dtype] = set()
    memories: set[torch.dtype] = set()
    block = model.blocks[0]
    block.mixer.output.register_forward_hook(lambda _m, _x, out: products.add(out.dtype))
    block.register_forward_hook(lambda _m, _x, out: memories.update(x.dtype for x in out))
    losses = train(model, TASK, recipe).losses
    assert {parameter.dtype for parameter in model.parameters()} == {torch.float32}
    # Held-out examples are read in float32.
    assert products == {torch.bfloat16, torch.float32}
    assert memories == {torch.float32}, "the residual stream, the memory and its mass"
    exact = train(fresh(), TASK, recipe.model_copy(update={"precision": "float32"})).losses
    assert 0 < abs(losses[0] / exact[0] - 1) < 0.01
    assert sum(losses[-5:]) < 0.9 * sum(losses[:5])
