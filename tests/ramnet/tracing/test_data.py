"""Whose writes a token reads, by the paper's definition; slot use, ages."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from ramnet.ops import Accesses
from ramnet.tracing.data import LayerTrace
from tests import brute_force
from tests.samples import LargestTensor, scan_inputs

TOKENS = 9


def layer(inputs: dict[str, Tensor], decay_power: float = 1.0, eps: float = 1e-6) -> LayerTrace:
    accesses = Accesses(*(inputs[name] for name in Accesses._fields))
    position = torch.arange(accesses.write_slots.shape[2]).expand(len(inputs["mass"]), -1)
    return LayerTrace(accesses, inputs["mass"], position, decay_power, eps, cape_heads=0)


@pytest.mark.parametrize("access", ["uniform", "hot", "saturated"])
@pytest.mark.parametrize("decay_power", [0.0, 0.4, 1.0, 3.0])
def test_sources_are_the_derivatives_of_the_output_by_each_tokens_value(access: str, decay_power: float) -> None:
    inputs = scan_inputs(2, 3, TOKENS, 3, 7, 1, dtype=torch.float64, access=access)
    values = inputs["values"].requires_grad_()
    output, _, _ = brute_force.memory_scan(inputs, decay_power, eps=0.01)
    rows = [torch.autograd.grad(output[:, :, t].sum(), values, retain_graph=True)[0] for t in range(TOKENS)]
    exact = torch.stack([row.squeeze(-1) for row in rows], 2)  # [B, H, T, T]
    torch.testing.assert_close(layer(inputs, decay_power, eps=0.01).sources(), exact)
    assert (exact > 0).float().mean() > 0.1


@pytest.mark.parametrize("access", ["uniform", "saturated"])
def test_the_rest_of_a_read_is_what_was_there_before_the_first_token(access: str) -> None:
    inputs = scan_inputs(2, 3, TOKENS, 3, 7, 1, dtype=torch.float64, access=access)
    found = layer(inputs).reads()
    # A value of 1 in all that was there before, and 0 in all that the tokens write.
    ones = {"memory": inputs["mass"].unsqueeze(-1), "values": torch.zeros_like(inputs["values"])}
    output, _, _ = brute_force.memory_scan({**inputs, **ones})
    torch.testing.assert_close(found.before, output.squeeze(-1))
    torch.testing.assert_close(found.total, layer(inputs).sources().sum(-1))


def test_reads_are_the_largest_sources_and_their_ages() -> None:
    traced = layer(scan_inputs(2, 3, TOKENS, 3, 7, 1, dtype=torch.float64))
    sources, found = traced.sources(), traced.reads(4)
    assert torch.equal(found.weights, sources.topk(4).values)
    read = found.weights > 0
    assert torch.equal(sources.gather(-1, found.tokens)[read], found.weights[read])
    ages = torch.stack([sources.diagonal(-age, 2, 3).sum(-1) for age in range(TOKENS)], -1)
    torch.testing.assert_close(found.by_age, ages)


def test_reads_make_no_table_of_all_pairs_of_tokens_or_of_all_slots() -> None:
    inputs = scan_inputs(1, 1, 100, 2, 8, 1)
    traced = layer(inputs | {"mass": torch.ones(1, 1, 500)})
    with LargestTensor() as largest:
        traced.reads()
    assert largest.numbers < 100**2 / 10


def test_more_tokens_than_there_are_is_all_of_them() -> None:
    inputs = scan_inputs(1, 1, 2, 1, 4, 1)
    assert layer(inputs).reads(8).weights.shape == (1, 1, 2, 2)


def test_slot_use_sums_the_weights_of_each_slot() -> None:
    slots = torch.tensor([[[[0, 1], [1, 3]]]], dtype=torch.int32)  # two tokens, two slots each
    written, read = torch.tensor([[[[0.5, 0.25], [0.5, 0.0]]]]), torch.tensor([[[[0.1, 0.2], [0.4, 0.3]]]])
    traced = layer({"write_slots": slots, "write_weights": written, "read_slots": slots.flip(2), "read_weights": read,
                    "mass": torch.full((1, 1, 4), 0.25)})  # fmt: skip
    assert traced.num_slots == 4
    torch.testing.assert_close(
        traced.use(), (torch.tensor([[[0.5, 0.75, 0, 0]]]), torch.tensor([[[0.4, 0.4, 0, 0.2]]]))
    )
    assert traced.share_used().tolist() == [[0.5]], "a weight of 0 uses no slot"
    assert traced.busiest_slots(0.5).tolist() == [[1]] and traced.busiest_slots(0.7).tolist() == [[2]]


def test_padding_alone_uses_nothing() -> None:
    inputs = scan_inputs(1, 2, 3, 2, 4, 1)
    traced = layer(inputs | {name: 0 * inputs[name] for name in ("write_weights", "read_weights")})
    assert traced.busiest_slots().tolist() == [[0, 0]] and traced.share_used().tolist() == [[0, 0]]
    assert not traced.reads().total.any()
