"""CAPE: cyclic_shift against the paper's [P_t(a)]_i = a_((i+t) mod M), and what it is for: distance."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from ramnet import ops
from tests.brute_force import cape, k_hot
from tests.samples import relative_rmse, scan_inputs


def test_moves_the_address_as_the_paper_says() -> None:
    inputs = scan_inputs(2, 3, 63, 4, 27, 5)
    slots, weights = inputs["write_slots"], inputs["write_weights"]
    shifted = ops.cyclic_shift(slots, torch.arange(63).unsqueeze(-1), 27)
    assert shifted.dtype == torch.int32
    assert torch.equal(k_hot(shifted, weights, 27), cape(k_hot(slots, weights, 27)))


@given(num_slots=st.sampled_from([1, 27]), slot=st.integers(0, 26), position=st.integers(-(2**40), 2**62))
def test_is_exact_at_any_position(num_slots: int, slot: int, position: int) -> None:
    for at in (position, torch.tensor(position)):
        shifted = ops.cyclic_shift(torch.tensor([slot], dtype=torch.int32), at, num_slots)
        assert int(shifted) == (slot - position) % num_slots


def test_broadcasts_the_position() -> None:
    assert ops.cyclic_shift(torch.zeros(3, 1, dtype=torch.int32), torch.arange(4), 5).tolist() == 3 * [[0, 4, 3, 2]]


@given(shift=st.integers(1, 10**6), seed=st.integers(0, 99))
def test_only_the_distance_matters(kernels: str, shift: int, seed: int) -> None:
    """Adding a constant to all positions rotates the state and does not change the outputs."""
    inputs = scan_inputs(1, 3, 31, 4, 27, 5, seed=seed)

    def run(start: int, memory: torch.Tensor, mass: torch.Tensor) -> tuple[torch.Tensor, ...]:
        position = start + torch.arange(31).unsqueeze(-1)
        addresses = {name: ops.cyclic_shift(inputs[name], position, 27) for name in ("write_slots", "read_slots")}
        return ops.memory_scan(**{**inputs, **addresses, "memory": memory, "mass": mass})

    output, memory, mass = run(0, inputs["memory"], inputs["mass"])
    later = run(shift, inputs["memory"].roll(-shift, 2), inputs["mass"].roll(-shift, 2))
    assert relative_rmse(later[0], output) <= 1e-6
    assert relative_rmse(later[1].roll(shift, 2), memory) <= 1e-6
    assert relative_rmse(later[2].roll(shift, 2), mass) <= 1e-6


def test_bad_input() -> None:
    slots = torch.zeros(3, dtype=torch.int32)
    with pytest.raises(ValueError, match="num_slots is 0; it must be positive"):
        ops.cyclic_shift(slots, 1, 0)
    with pytest.raises(TypeError, match=r"slots is torch\.float32; it must be an integer type"):
        ops.cyclic_shift(slots.float(), 1, 5)
    with pytest.raises(TypeError, match=r"position is torch\.float32; it must be an integer type"):
        ops.cyclic_shift(slots, torch.tensor(1.5), 5)
