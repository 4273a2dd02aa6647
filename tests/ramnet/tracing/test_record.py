"""A trace holds what the model really did to its memory, on any kernels."""

from __future__ import annotations

import threading

import pytest
import torch
from torch import Tensor

import lowering
import ramnet
from ramnet import RamLayer, RamNetForCausalLM, RamState
from ramnet.baselines.model import BaselineConfig, BaselineForCausalLM
from ramnet.tracing.data import Trace
from tests.ramnet.test_masks import LENGTH, MASK, middle
from tests.ramnet.test_model import small_model, tokens


def heads_of(model: RamNetForCausalLM, ids: Tensor) -> list[tuple[Tensor, Tensor]]:
    """The values and the outputs of the heads in each layer, [B, H, T, D], as its own matrices take and give them."""
    found: list[tuple[Tensor, Tensor]] = []
    values: list[Tensor] = []
    hooks = []
    for mixer in (module for module in model.modules() if isinstance(module, RamLayer)):
        sizes = (mixer.config.num_heads, mixer.config.value_dim)

        def seen(_: object, __: object, out: Tensor, sizes: tuple[int, int] = sizes) -> None:
            values.append(out[..., -sizes[0] * sizes[1] :].unflatten(-1, sizes).transpose(1, 2))

        def left(_: object, given: tuple[Tensor], sizes: tuple[int, int] = sizes) -> None:
            found.append((values[-1], given[0].unflatten(-1, sizes).transpose(1, 2)))

        hooks += [mixer.query_key_value.register_forward_hook(seen), mixer.output.register_forward_pre_hook(left)]
    with torch.no_grad():
        model(ids)
    for hook in hooks:
        hook.remove()
    return found


def assert_match(mine: Trace, theirs: Trace) -> None:
    for a, b in zip(mine.layers, theirs.layers, strict=True):
        torch.testing.assert_close((*a.accesses, a.mass), (*b.accesses, b.mass), rtol=1e-4, atol=1e-5)


def test_a_heads_output_is_the_sum_of_the_values_that_it_read(kernels: str) -> None:
    model, ids = small_model(), tokens(2, LENGTH)
    traced = ramnet.trace(model, ids)
    found = heads_of(model, ids)
    assert len(traced.layers) == len(found) == model.config.num_layers
    for layer, (values, output) in zip(traced.layers, found, strict=True):
        torch.testing.assert_close(layer.sources() @ values, output, rtol=1e-4, atol=1e-5)


def test_the_layers_say_which_heads_move(kernels: str) -> None:
    model = small_model()
    layers = ramnet.trace(model, tokens(1, 2)).layers
    assert [layer.cape_heads for layer in layers] == [model.config.cape_heads(i) for i in range(len(layers))]


def test_layers_are_those_of_the_calls_in_their_order() -> None:
    class First(RamNetForCausalLM):
        """Calls its second block, whose heads move less, before the first, and then once more."""

        def run_layers(self, x: Tensor, *given: object, **named: object):
            x, *_ = super().run_block(self.blocks[1], x, *middle_of(self, 1), False, None)
            return super().run_layers(x, *given, **named)

    def middle_of(model: RamNetForCausalLM, layer: int) -> tuple[Tensor, Tensor, Tensor]:
        state = RamState.zeros(model.config, 1)
        return state.memory[layer], state.mass[layer], state.position

    model = First.of(small_model().config, small_model().state_dict())
    moving = [model.config.cape_heads(i) for i in range(model.config.num_layers)]
    assert len(set(moving)) > 1
    layers = ramnet.trace(model, tokens(1, 5)).layers
    assert [layer.cape_heads for layer in layers] == [moving[1], *moving]
    assert not any(module._forward_pre_hooks for module in model.modules())


def test_another_thread_may_run_the_model_meanwhile() -> None:
    model, ids = small_model(), tokens(1, 5)
    moving = [layer.cape_heads for layer in ramnet.trace(model, ids).layers]
    ended = threading.Event()

    def run() -> None:
        with torch.no_grad():
            while not ended.is_set():
                model(ids)

    other = threading.Thread(target=run)
    other.start()
    try:
        found = [[layer.cape_heads for layer in ramnet.trace(model, ids).layers] for _ in range(20)]
    finally:
        ended.set()
        other.join()
    assert found == [moving] * 20


def test_a_trace_is_read_whatever_the_default_device_is() -> None:
    layer = ramnet.trace(small_model(), tokens(1, 5)).layers[0]
    expected, total = layer.sources(), layer.reads().total
    with torch.device("meta"):
        assert torch.equal(layer.sources(), expected) and torch.equal(layer.reads().total, total)


def test_a_trace_continues_from_a_state(kernels: str) -> None:
    model, ids = small_model(), tokens(2, LENGTH)
    whole, first = ramnet.trace(model, ids), ramnet.trace(model, ids[:, :4])
    kept = first.state.clone()
    rest = ramnet.trace(model, ids[:, 4:], first.state)
    assert all(torch.equal(x, kept.tensors()[name]) for name, x in first.state.tensors().items()), "it is not modified"
    for all_of_it, part in zip(whole.layers, rest.layers, strict=True):
        for mine, theirs in zip(part.accesses, all_of_it.accesses, strict=True):
            torch.testing.assert_close(mine, theirs[:, :, 4:])
        torch.testing.assert_close(part.sources(), all_of_it.sources()[:, :, 4:, 4:])
        reads, all_reads = part.reads(), all_of_it.reads()
        torch.testing.assert_close(reads.total + reads.before, (all_reads.total + all_reads.before)[:, :, 4:])


def test_padding_changes_no_row(kernels: str) -> None:
    model, ids = small_model(), tokens(len(MASK), LENGTH)
    state = middle(model)
    traced = ramnet.trace(model, ids, state, attention_mask=MASK)
    assert torch.equal(traced.real, MASK.bool())
    for row, (mask, own) in enumerate(zip(MASK.bool(), state.split(), strict=True)):
        if not mask.any():
            continue
        alone = ramnet.trace(model, ids[row : row + 1, mask], own)
        for layer, exact in zip(traced.layers, alone.layers, strict=True):
            sources, by_age = layer.sources()[row], layer.reads().by_age[row]
            torch.testing.assert_close(sources[:, mask][:, :, mask], exact.sources()[0])
            assert not sources[:, ~mask].any() and not sources[:, :, ~mask].any()
            torch.testing.assert_close(by_age[:, : int(mask.sum())], exact.reads().by_age[0])


@pytest.mark.parametrize("length", [3, 40])
def test_a_compiled_model_is_traced_as_the_original(length: int) -> None:
    pytest.importorskip("tvm", reason="the CPU kernels need tvm: pip install 'ramnet[tvm]'")
    model, ids = small_model(), tokens(1, length)
    for compiled in (lowering.compile(model), torch.compile(model)):
        assert_match(ramnet.trace(compiled, ids), ramnet.trace(model, ids))


def test_weights_in_half_precision_are_recorded_as_they_are() -> None:
    traced = ramnet.trace(small_model().bfloat16(), tokens(1, 5))
    weights = traced.layers[0].accesses.write_weights
    assert weights.dtype == torch.float32 and torch.equal(weights, weights.bfloat16().float())


@pytest.mark.parametrize(
    ("ids", "message"),
    [
        (torch.zeros(1, 0, dtype=torch.int64), r"input_ids has shape \[1, 0\]; trace needs \[B, T\] with B and T >= 1"),
        (torch.zeros(4, dtype=torch.int64), r"input_ids has shape \[4\]; trace needs \[B, T\]"),
        (torch.tensor([[0, 999]]), r"input_ids holds 999; token ids must be in 0\.\."),
        (torch.tensor([[-1, 0]]), r"input_ids holds -1; token ids must be in 0\.\."),
        (torch.zeros(1, 3), r"input_ids is torch\.float32; it must be torch\.int64"),
    ],
)
def test_ids_that_cannot_be_read_are_named(ids: Tensor, message: str) -> None:
    with pytest.raises((ValueError, TypeError), match=f"^{message}"):
        ramnet.trace(small_model(), ids)


def test_a_model_without_a_memory_is_refused() -> None:
    sizes = {"vocab_size": 8, "hidden_size": 16, "num_layers": 1, "num_heads": 2, "key_dim": 8, "value_dim": 8}
    model = BaselineForCausalLM(BaselineConfig(mixer="attention", **sizes))
    with pytest.raises(ValueError, match=r"^BaselineForCausalLM has no RAM-Net layer, so there is no memory"):
        ramnet.trace(model, torch.zeros(1, 3, dtype=torch.int64))
