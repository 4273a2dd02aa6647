"""RamState is a value: it can be cloned, reordered, merged, split and divided by layer."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
import torch

from ramnet import RamLayer, RamNetForCausalLM, RamState
from tests.ramnet.states import CONFIG, equal, random_state


def test_zeros_is_the_papers_initial_state() -> None:
    state = RamState.zeros(CONFIG, 4, dtype=torch.float64)
    assert [list(x.shape) for x in state.memory] == [[4, 3, 27, 5], [4, 2, 16, 4]]
    assert [list(x.shape) for x in state.mass] == [[4, 3, 27], [4, 2, 16]]
    assert [list(x.shape) for x in state.conv] == [[4, 2, 6]]
    assert all(bool((x == 0).all()) for x in (*state.memory, *state.conv))
    assert [x.unique().tolist() for x in state.mass] == [[1 / 27], [1 / 16]]
    assert {x.dtype for x in (*state.memory, *state.mass, *state.conv)} == {torch.float64}
    assert state.position.dtype == torch.int64 and state.position.tolist() == [0, 0, 0, 0]
    assert state.batch_size == 4


def test_a_clone_shares_nothing() -> None:
    state = random_state()
    copy = state.clone()
    assert equal(state, copy)
    for tensor in copy.tensors().values():
        tensor.zero_()
    assert equal(state, random_state())


def test_reorder_picks_batch_entries_and_shares_nothing() -> None:
    state = random_state()
    picked = state.reorder(torch.tensor([2, 0, 0, 1]))
    assert picked.batch_size == 4
    for name, tensor in picked.tensors().items():
        assert torch.equal(tensor, torch.stack([state.tensors()[name][i] for i in (2, 0, 0, 1)]))
        tensor.zero_()
    assert equal(state, random_state())


def test_merged_states_are_the_rows_of_each_and_split_gives_them_back() -> None:
    first, second = random_state(2), random_state(3)
    merged = RamState.merge([first, second])
    assert merged.batch_size == 5
    for state, rows in ((first, slice(0, 2)), (second, slice(2, 5))):
        for name, tensor in state.tensors().items():
            assert torch.equal(merged.tensors()[name][rows], tensor)
    assert all(equal(a, b) for a, b in zip(merged.split([2, 3]), (first, second), strict=True))
    alone = merged.split()
    assert [state.batch_size for state in alone] == [1] * 5
    assert equal(alone[4], second.reorder(torch.tensor([2])))
    for tensor in alone[4].tensors().values():
        tensor.zero_()
    assert equal(RamState.merge(merged.split()), RamState.merge([first, second]))


@pytest.mark.parametrize("sizes", [[2], [2, 2], [3, 0], [4, -1]])
def test_sizes_that_do_not_add_up_to_the_rows_are_refused(sizes: list[int]) -> None:
    with pytest.raises(ValueError, match=re.escape(f"sizes is {sizes}; they must be at least 1 and add up to 3 rows")):
        random_state().split(sizes)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda s: s.conv.pop(), "states[1] and states[0] are not of the same layers: one has no conv.0"),
        (lambda s: s.mass.__setitem__(1, s.mass[1].double()),
         "a row's mass.1 is torch.float64 [2, 16] on cpu in states[1] but torch.float32 [2, 16] on cpu in states[0]"),
        (lambda s: s.memory.__setitem__(0, s.memory[0][..., :4]),
         "a row's memory.0 is torch.float32 [3, 27, 4] on cpu in states[1]"),
    ],
)  # fmt: skip
def test_states_of_different_layers_are_not_merged(change: Any, message: str) -> None:
    other = random_state()
    change(other)
    with pytest.raises(ValueError, match=re.escape(message)):
        RamState.merge([random_state(), other])
    with pytest.raises(ValueError, match="states is empty; there must be at least one"):
        RamState.merge([])


LAYERS = [RamLayer(6, 3, value_dim=5, order=3, sub_dim=3), RamLayer(6, 2, order=2, sub_dim=3)]


def test_layers_of_different_sizes_share_a_state() -> None:
    state = RamState.zeros(LAYERS, 4)
    assert [list(x.shape) for x in state.memory] == [[4, 3, 27, 5], [4, 2, 9, 3]]
    assert [float(x[3, 1, 8]) for x in state.mass] == [pytest.approx(1 / 27), pytest.approx(1 / 9)]
    state.check(LAYERS, 4, torch.device("cpu"))
    with pytest.raises(ValueError, match=re.escape("state.memory[0] has shape [4, 3, 27, 5]; it must be [4, 2, 9, 3]")):
        state.check(LAYERS[::-1], 4, torch.device("cpu"))


@torch.no_grad()
def test_a_state_is_divided_by_layer_and_joined_again(tmp_path: Path) -> None:
    x = torch.randn(4, 1, 6, generator=torch.Generator().manual_seed(0))
    state = RamState.zeros(LAYERS, 4)
    for layer, own in zip(LAYERS, state.layers(), strict=True):
        layer(x, own, in_place=True)  # the layers' states share memory with the whole state
    after = RamState.of_layers([layer(x).state for layer in LAYERS])
    assert all(torch.equal(a, b) for a, b in zip(after.memory, state.memory, strict=True))
    assert after.position.tolist() == [1, 1, 1, 1]
    after.save(tmp_path / "s")
    assert equal(RamState.load(tmp_path / "s"), after)


def test_states_of_layers_at_different_positions_are_not_joined() -> None:
    states = RamState.zeros(LAYERS, 1).layers()
    states[1].position += 3
    with pytest.raises(ValueError, match=re.escape("states[1] is at position [3] and states[0] at [0]; all layers")):
        RamState.of_layers(states)
    with pytest.raises(ValueError, match="states is empty; there must be at least one"):
        RamState.of_layers([])


def test_the_state_after_a_prompt_holds_no_memory_of_the_prompt() -> None:
    model = RamNetForCausalLM(CONFIG)
    with torch.no_grad():
        state = model(torch.zeros(1, 500, dtype=torch.int64)).state
    assert all(x.untyped_storage().nbytes() == x.nbytes for x in state.tensors().values())


def test_batch_size_must_be_positive() -> None:
    with pytest.raises(ValueError, match="batch_size is 0; it must be at least 1"):
        RamState.zeros(CONFIG, 0)


def test_layers_may_be_a_list_of_modules() -> None:
    layers = torch.nn.ModuleList([RamLayer(8, 2, order=2), RamLayer(8, 2, order=1, top_k=2)])
    assert [x.shape[2] for x in RamState.zeros(layers, 3).memory] == [16, 4]


def test_states_are_compared_by_identity() -> None:
    state = RamState.zeros(CONFIG, 1)
    assert [state.clone(), state].index(state) == 1
