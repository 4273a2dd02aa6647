"""Properties of the memory ops for every input: splits, permutations, writes of weight zero."""

from __future__ import annotations

import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from ramnet import ops
from tests.samples import DIFFERENTIABLE, relative_rmse, scan_inputs, step_inputs

SEEDS = st.integers(0, 999)
# Few different (K, M, D, γ), since each compiles a kernel, and those of test_ops_memory_scan.py; all else is arbitrary.
SHAPES = st.sampled_from([(4, 27, 24), (8, 64, 33)])
POWERS = st.sampled_from([0.5, 1.0])
ALONG_TIME = ("write_slots", "write_weights", "read_slots", "read_weights", "values")
Case = tuple[int, int, int]


def part(inputs: dict[str, Tensor], start: int, stop: int) -> dict[str, Tensor]:
    return {name: inputs[name][:, :, start:stop] for name in ALONG_TIME}


@given(shape=SHAPES, power=POWERS, seed=SEEDS, tokens=st.integers(0, 40), data=st.data())
def test_any_split_of_a_sequence_gives_the_same(
    kernels: str, shape: Case, power: float, seed: int, tokens: int, data: st.DataObject
) -> None:
    """Compare output, final state and every gradient; parts may be empty, and a part of one token may be a step."""
    inputs = scan_inputs(1, 2, tokens, *shape, seed=seed, access="saturated")
    cuts = sorted(data.draw(st.lists(st.integers(0, tokens), max_size=5), label="cuts"))
    leaves = [inputs[name].requires_grad_() for name in DIFFERENTIABLE]
    whole = ops.memory_scan(**inputs, decay_power=power)
    outputs, memory, mass = [], inputs["memory"], inputs["mass"]
    for start, stop in zip([0, *cuts], [*cuts, tokens], strict=True):
        output, memory, mass = ops.memory_scan(
            **part(inputs, start, stop), memory=memory, mass=mass, decay_power=power
        )  # fmt: skip
        outputs.append(output)
    pieces = (torch.cat(outputs, 2), memory, mass)
    for name, split, once in zip(("output", "memory", "mass"), pieces, whole, strict=True):
        assert relative_rmse(split, once) <= 1e-6, name
    cotangents = [torch.randn(x.shape, generator=torch.Generator().manual_seed(seed)) for x in whole]
    split_grads = torch.autograd.grad(pieces, leaves, cotangents)
    for name, split, once in zip(
        DIFFERENTIABLE, split_grads, torch.autograd.grad(whole, leaves, cotangents), strict=True
    ):
        assert relative_rmse(split, once) <= 1e-5, name


@given(shape=SHAPES, power=POWERS, seed=SEEDS, first=st.integers(0, 9), steps=st.integers(1, 9))
def test_steps_go_on_where_a_scan_stopped(
    kernels: str, shape: Case, power: float, seed: int, first: int, steps: int
) -> None:
    inputs = scan_inputs(2, 1, first + steps, *shape, seed=seed)
    whole, whole_memory, whole_mass = ops.memory_scan(**inputs, decay_power=power)
    _, memory, mass = ops.memory_scan(
        **part(inputs, 0, first), memory=inputs["memory"], mass=inputs["mass"], decay_power=power
    )
    for t in range(first, first + steps):
        step = step_inputs(inputs, t) | {"memory": memory, "mass": mass}
        assert relative_rmse(ops.memory_step(**step, decay_power=power), whole[:, :, t]) <= 1e-5
    assert relative_rmse(memory, whole_memory) <= 1e-6 and relative_rmse(mass, whole_mass) <= 1e-6


@given(shape=SHAPES, seed=SEEDS, order=st.permutations(range(3)), axis=st.sampled_from([0, 1]))
def test_permuting_heads_or_sequences_permutes_the_results(
    kernels: str, shape: Case, seed: int, order: list[int], axis: int
) -> None:
    inputs = scan_inputs(3, 3, 17, *shape, seed=seed)
    index = torch.tensor(order)
    permuted = ops.memory_scan(**{name: x.index_select(axis, index) for name, x in inputs.items()})
    for actual, expected in zip(permuted, ops.memory_scan(**inputs), strict=True):
        assert torch.equal(actual, expected.index_select(axis, index))


@given(shape=SHAPES, seed=SEEDS, data=st.data())
def test_the_order_of_a_tokens_slots_does_not_matter(
    kernels: str, shape: Case, seed: int, data: st.DataObject
) -> None:  # fmt: skip
    inputs = scan_inputs(1, 3, 17, *shape, seed=seed)
    shuffled = dict(inputs)
    for kind in ("write", "read"):
        order = torch.tensor(data.draw(st.permutations(range(shape[0])), label=kind))
        for name in (f"{kind}_slots", f"{kind}_weights"):
            shuffled[name] = inputs[name][..., order]
    for actual, expected in zip(ops.memory_scan(**shuffled), ops.memory_scan(**inputs), strict=True):
        assert relative_rmse(actual, expected) <= 1e-6


@given(shape=SHAPES, power=st.sampled_from([0.0, 0.5, 1.0, 2.0]), seed=SEEDS)
def test_writes_of_weight_zero_leave_the_state_alone(kernels: str, shape: Case, power: float, seed: int) -> None:
    inputs = scan_inputs(1, 3, 17, *shape, seed=seed)
    inputs["write_weights"] = torch.zeros_like(inputs["write_weights"])
    _, memory, mass = ops.memory_scan(**inputs, decay_power=power)
    assert torch.equal(memory, inputs["memory"]) and torch.equal(mass, inputs["mass"])


@given(shape=SHAPES, power=POWERS, seed=SEEDS)
def test_a_token_sees_its_own_write_and_none_after(kernels: str, shape: Case, power: float, seed: int) -> None:
    inputs = scan_inputs(1, 3, 17, *shape, seed=seed)
    output, *_ = ops.memory_scan(**inputs, decay_power=power)
    changed = inputs | {"values": inputs["values"].clone(), "read_slots": inputs["write_slots"]}
    seen, *_ = ops.memory_scan(**changed, decay_power=power)
    changed["values"][:, :, 9] += 1
    after, *_ = ops.memory_scan(**changed, decay_power=power)
    assert torch.equal(after[:, :, :9], seen[:, :, :9])
    assert bool((after[:, :, 9] != seen[:, :, 9]).all())
    assert bool(output.isfinite().all())
