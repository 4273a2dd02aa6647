"""memory_step is memory_scan of one token, in place, on the addressed rows alone."""

from __future__ import annotations

import pytest
import torch

from ramnet import ops
from tests import brute_force
from tests.samples import TOLERANCE, relative_rmse, scan_inputs, step_inputs, strided

# (B, H, K, M, D, γ)
SIZES = [
    (1, 1, 1, 1, 1, 1.0),
    (1, 3, 2, 9, 5, 0.5),
    (3, 1, 9, 9, 24, 2.0),
    (1, 3, 8, 64, 33, 0.0),
    (2, 2, 8, 32, 64, 1.0),
]


@pytest.mark.parametrize(("batch", "heads", "top_k", "num_slots", "value_dim", "power"), SIZES)
def test_steps_equal_the_dense_recurrence(
    kernels: str, batch: int, heads: int, top_k: int, num_slots: int, value_dim: int, power: float
) -> None:
    inputs = scan_inputs(batch, heads, 7, top_k, num_slots, value_dim, access="saturated")
    expected, expected_memory, expected_mass = brute_force.memory_scan(inputs, decay_power=power)
    memory, mass = inputs["memory"].clone(), inputs["mass"].clone()
    for t in range(7):
        step = step_inputs(inputs, t) | {"memory": memory, "mass": mass}
        output = ops.memory_step(**step, decay_power=power)
        assert relative_rmse(output, expected[:, :, t]) <= 1e-5
    assert relative_rmse(memory, expected_memory) <= 1e-5
    assert relative_rmse(mass, expected_mass) <= 1e-5


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("wide_state", [False, True], ids=["same", "float32-state"])
def test_equals_the_scan_of_one_token(kernels: str, dtype: torch.dtype, wide_state: bool) -> None:
    state_dtype = torch.promote_types(dtype, torch.float32) if wide_state else dtype
    inputs = scan_inputs(2, 3, 1, 4, 27, 24, dtype=dtype, state_dtype=state_dtype)
    expected, expected_memory, expected_mass = brute_force.memory_scan(inputs)
    step = step_inputs(inputs, 0)
    output = ops.memory_step(**step)
    assert output.dtype == dtype and output.shape == (2, 3, 24)
    # A read uses the row as stored, rounded to the state's dtype.
    assert relative_rmse(output, expected[:, :, 0]) <= 2 * TOLERANCE[dtype]
    assert relative_rmse(step["memory"], expected_memory) <= TOLERANCE[state_dtype]
    assert relative_rmse(step["mass"], expected_mass) <= TOLERANCE[state_dtype]


def test_only_the_addressed_rows_are_accessed(kernels: str) -> None:
    """All other rows hold NaN, which would appear in the output if one were read."""
    inputs = scan_inputs(2, 3, 1, 4, 27, 5)
    written = brute_force.k_hot(inputs["write_slots"], torch.ones(2, 3, 1, 4), 27).bool()[:, :, 0]
    read = brute_force.k_hot(inputs["read_slots"], torch.ones(2, 3, 1, 4), 27).bool()[:, :, 0]
    clean, poisoned = step_inputs(inputs, 0), step_inputs(inputs, 0)
    poisoned["memory"][~(written | read)] = torch.nan
    poisoned["mass"][~(written | read)] = torch.nan
    assert torch.equal(ops.memory_step(**poisoned), ops.memory_step(**clean))
    for name in ("memory", "mass"):
        assert torch.equal(poisoned[name][written], clean[name][written])
        only_read = read & ~written
        assert torch.equal(poisoned[name][only_read], inputs[name][only_read])
        assert bool(poisoned[name][~(written | read)].isnan().all())


def test_updates_only_the_given_state(kernels: str) -> None:
    inputs = scan_inputs(1, 3, 1, 4, 27, 5)
    step = step_inputs(inputs, 0)
    before = {name: x.clone() for name, x in step.items()}
    address = step["memory"].data_ptr()
    ops.memory_step(**step)
    assert step["memory"].data_ptr() == address
    for name, x in step.items():
        assert torch.equal(x, before[name]) == (name not in ("memory", "mass")), name


def test_inputs_other_than_the_state_may_have_any_strides(kernels: str) -> None:
    inputs = scan_inputs(2, 3, 1, 4, 27, 5)
    plain, spread = step_inputs(inputs, 0), step_inputs(inputs, 0)
    spread = {name: x if name in ("memory", "mass") else strided(x) for name, x in spread.items()}
    assert torch.equal(ops.memory_step(**spread), ops.memory_step(**plain))
    assert torch.equal(spread["memory"], plain["memory"]) and torch.equal(spread["mass"], plain["mass"])


def test_a_part_of_a_larger_state_can_be_stepped(kernels: str) -> None:
    """A contiguous slice may have a storage offset."""
    inputs = scan_inputs(3, 2, 1, 4, 27, 5)
    whole, one = step_inputs(inputs, 0), step_inputs({name: x[1:2] for name, x in inputs.items()}, 0)
    expected = ops.memory_step(**one)
    part = {name: x[1:2] for name, x in whole.items()}
    assert torch.equal(ops.memory_step(**part), expected)
    assert torch.equal(whole["memory"][1:2], one["memory"])
    assert torch.equal(whole["memory"][0], inputs["memory"][0])
    assert torch.equal(whole["memory"][2], inputs["memory"][2])


def test_a_backward_pass_that_needs_the_state_before_a_step_is_an_error(kernels: str) -> None:
    inputs = scan_inputs(1, 2, 3, 4, 27, 5)
    inputs["values"].requires_grad_()
    output, *_ = ops.memory_scan(**inputs)
    with torch.no_grad():
        ops.memory_step(**step_inputs({**inputs, "values": inputs["values"].detach()}, 0))
        state = {"memory": inputs["memory"], "mass": inputs["mass"]}
        ops.memory_step(**{**step_inputs(inputs, 0), **state})
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        output.sum().backward()


@pytest.mark.parametrize("name", ["write_weights", "read_weights", "values", "memory", "mass"])
def test_gradients_are_refused(kernels: str, name: str) -> None:
    slots = torch.zeros(1, 1, 1, dtype=torch.int32)
    inputs = {"write_slots": slots, "write_weights": torch.ones(1, 1, 1), "read_slots": slots,
              "read_weights": torch.ones(1, 1, 1), "values": torch.ones(1, 1, 3), "memory": torch.zeros(1, 1, 4, 3),
              "mass": torch.ones(1, 1, 4)}  # fmt: skip
    inputs[name].requires_grad_()
    with pytest.raises(ValueError, match=f"^{name} requires gradients, which memory_step does not compute"):
        ops.memory_step(**inputs)
    with torch.no_grad():
        assert ops.memory_step(**inputs).shape == (1, 1, 3)
