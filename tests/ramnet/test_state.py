"""RamState: a value that can be cloned, reordered, saved and loaded."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file

from ramnet import RamLayer, RamNetConfig, RamNetForCausalLM, RamState
from tests.samples import full_disk

CONFIG = RamNetConfig.preset(
    "tiny", hidden_size=6, num_layers=2, conv_layers=1, num_heads=3, value_dim=5, order=3, sub_dim=3
)


def random_state(batch: int = 3) -> RamState:
    state = RamState.zeros(CONFIG, batch)
    generator = torch.Generator().manual_seed(0)
    for tensor in (*state.memory, *state.mass, *state.conv):
        tensor.copy_(torch.rand(tensor.shape, generator=generator))
    state.position.copy_(2**40 + torch.arange(batch))
    return state


def equal(a: RamState, b: RamState) -> bool:
    mine, theirs = a.tensors(), b.tensors()
    return mine.keys() == theirs.keys() and all(torch.equal(mine[name], theirs[name]) for name in mine)


def test_zeros_is_the_papers_initial_state() -> None:
    state = RamState.zeros(CONFIG, 4, dtype=torch.float64)
    assert [list(x.shape) for x in state.memory] == 2 * [[4, 3, 27, 5]]
    assert [list(x.shape) for x in state.mass] == 2 * [[4, 3, 27]]
    assert [list(x.shape) for x in state.conv] == [[4, 2, 6]]
    assert all(bool((x == 0).all()) for x in (*state.memory, *state.conv))
    assert all(x.unique().tolist() == [1 / 27] for x in state.mass)
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
def test_sizes_that_are_not_the_rows_are_refused(sizes: list[int]) -> None:
    with pytest.raises(ValueError, match=re.escape(f"sizes is {sizes}; they must be at least 1 and add up to 3 rows")):
        random_state().split(sizes)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda s: s.conv.pop(), "states[1] and states[0] are not of the same layers: one has no conv.0"),
        (lambda s: s.mass.__setitem__(1, s.mass[1].double()),
         "a row's mass.1 is torch.float64 [3, 27] on cpu in states[1] but torch.float32 [3, 27] on cpu in states[0]"),
        (lambda s: s.memory.__setitem__(0, s.memory[0][..., :4]),
         "a row's memory.0 is torch.float32 [3, 27, 4] on cpu in states[1]"),
    ],
)  # fmt: skip
def test_states_that_are_not_alike_are_not_merged(change: Any, message: str) -> None:
    other = random_state()
    change(other)
    with pytest.raises(ValueError, match=re.escape(message)):
        RamState.merge([random_state(), other])
    with pytest.raises(ValueError, match="states is empty; there must be at least one"):
        RamState.merge([])


def test_a_file_with_one_position_for_all_rows_is_read(tmp_path: Path) -> None:
    tensors = random_state().tensors() | {"position": torch.tensor(41)}
    save_file(tensors, tmp_path / "old")
    loaded = RamState.load(tmp_path / "old")
    assert loaded.position.tolist() == [41, 41, 41] and loaded.position.dtype == torch.int64
    assert equal(loaded, RamState(loaded.memory, loaded.mass, loaded.conv, torch.full((3,), 41)))
    check(loaded, in_place=True)


LAYERS = [RamLayer(6, 3, value_dim=5, order=3, sub_dim=3), RamLayer(6, 2, order=2, sub_dim=3)]


def test_layers_of_any_sizes_have_a_state_together() -> None:
    state = RamState.zeros(LAYERS, 4)
    assert [list(x.shape) for x in state.memory] == [[4, 3, 27, 5], [4, 2, 9, 3]]
    assert [float(x[3, 1, 8]) for x in state.mass] == [pytest.approx(1 / 27), pytest.approx(1 / 9)]
    state.check(LAYERS, 4, torch.device("cpu"))
    with pytest.raises(ValueError, match=re.escape("state.memory[0] has shape [4, 3, 27, 5]; it must be [4, 2, 9, 3]")):
        state.check(LAYERS[::-1], 4, torch.device("cpu"))


@torch.no_grad()
def test_a_state_is_handed_out_layer_by_layer_and_put_together_again(tmp_path: Path) -> None:
    x = torch.randn(4, 1, 6, generator=torch.Generator().manual_seed(0))
    state = RamState.zeros(LAYERS, 4)
    for layer, own in zip(LAYERS, state.layers(), strict=True):
        layer(x, own, in_place=True)  # the whole state's memory is the layer's
    after = RamState.of_layers([layer(x).state for layer in LAYERS])
    assert all(torch.equal(a, b) for a, b in zip(after.memory, state.memory, strict=True))
    assert after.position.tolist() == [1, 1, 1, 1]
    after.save(tmp_path / "s")
    assert equal(RamState.load(tmp_path / "s"), after)


def test_states_of_layers_at_other_positions_are_not_put_together() -> None:
    states = RamState.zeros(LAYERS, 1).layers()
    states[1].position += 3
    with pytest.raises(ValueError, match=re.escape("states[1] is at position [3] and states[0] at [0]; all layers")):
        RamState.of_layers(states)
    with pytest.raises(ValueError, match="states is empty; there must be at least one"):
        RamState.of_layers([])


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.float16])
def test_survives_its_file(dtype: torch.dtype, tmp_path: Path) -> None:
    state = RamState.zeros(CONFIG, 2, dtype=dtype)
    state.save(tmp_path / "new" / "session.safetensors")
    assert equal(RamState.load(tmp_path / "new" / "session.safetensors"), state)
    random_state().save(tmp_path / "new" / "session.safetensors")
    assert equal(RamState.load(tmp_path / "new" / "session.safetensors"), random_state())
    assert [path.name for path in (tmp_path / "new").iterdir()] == ["session.safetensors"]


def test_a_reordered_or_strided_state_can_be_saved(tmp_path: Path) -> None:
    state = random_state()
    state.memory[0] = state.memory[0].transpose(0, 1).contiguous().transpose(0, 1)
    state.save(tmp_path / "s")
    assert equal(RamState.load(tmp_path / "s"), random_state())


def test_a_loaded_state_is_aligned_as_torchs_own_memory_is_and_its_own(tmp_path: Path) -> None:
    random_state().save(tmp_path / "s")
    loaded = RamState.load(tmp_path / "s")
    assert all(tensor.data_ptr() % 64 == 0 for tensor in loaded.tensors().values())
    content = (tmp_path / "s").read_bytes()
    with (tmp_path / "s").open("r+b") as file:  # the same file, not another in its place
        file.write(b"\0" * len(content))
    assert equal(loaded, random_state())


def check(state: RamState, batch: int = 3, in_place: bool = False) -> None:
    state.check(CONFIG, batch, torch.device("cpu"), in_place)


def test_a_state_is_checked_whole() -> None:
    check(random_state())
    check(random_state(), in_place=True)
    for name, tensor in random_state().tensors().items():
        kind, _, index = name.partition(".")
        shown = f"state.{kind}[{index}]" if index else "state.position"
        for changed, error, message in (
            (tensor.unsqueeze(-1), ValueError, f"{shown} has shape {[*tensor.shape, 1]}; it must be {[*tensor.shape]}"),
            (tensor.to("meta"), ValueError, f"{shown} is on meta but input_ids is on cpu"),
            (tensor > 0, TypeError, f"{shown} is torch.bool; it must be"),
        ):
            state = random_state()
            if index:
                getattr(state, kind)[int(index)] = changed
            else:
                state.position = changed
            with pytest.raises(error, match=re.escape(message)):
                check(state)


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        (lambda s: s.position[1:2].fill_(-3), ValueError, "state.position holds -3; it must be >= 0"),
        (lambda s: setattr(s, "position", torch.tensor(2)), ValueError,
         "state.position has shape []; it must be [3]"),
        (lambda s: setattr(s, "position", torch.zeros(3)), TypeError,
         "state.position is torch.float32; it must be torch.int64"),
        (lambda s: s.mass.__setitem__(1, s.mass[1].double()), TypeError,
         "state.mass[1] is torch.float64 but state.memory[1] is torch.float32; use one type"),
        (lambda s: s.conv.pop(), ValueError, "state.conv has 0 layers; this model has 1"),
    ],
)  # fmt: skip
def test_what_is_no_state_is_refused(change: Any, error: type[Exception], message: str) -> None:
    state = random_state()
    change(state)
    with pytest.raises(error, match=re.escape(message)):
        check(state)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda s: s.memory.__setitem__(1, s.memory[1].mT.contiguous().mT),
         "state.memory[1] has strides [405, 135, 1, 27]; only a contiguous state is updated in place"),
        (lambda s: s.conv.__setitem__(0, s.conv[0][:1].expand(3, -1, -1)),
         "state.conv[0] has strides [0, 6, 1]; only a contiguous state is updated in place"),
        (lambda s: s.mass[0].requires_grad_(), "state.mass[0] requires gradients"),
    ],
)  # fmt: skip
def test_what_cannot_be_updated_in_place_is_refused_there_alone(change: Any, message: str) -> None:
    state = random_state()
    change(state)
    check(state)
    with pytest.raises(ValueError, match=re.escape(message)):
        check(state, in_place=True)


@torch.no_grad()
def test_a_state_that_requires_gradients_is_updated_where_none_are_taken() -> None:
    state = random_state()
    state.mass[0].requires_grad_()
    check(state, in_place=True)


def test_a_state_of_inference_mode_is_updated_there_alone() -> None:
    with torch.inference_mode():
        state = random_state()
        check(state, in_place=True)
    check(state)
    with pytest.raises(ValueError, match=re.escape("state.memory[0] was made in torch.inference_mode() and cannot be")):
        check(state, in_place=True)
    check(state.clone(), in_place=True)


def test_a_position_that_cannot_be_read_is_not_asked_for() -> None:
    RamState.zeros(CONFIG, 3, device="meta").check(CONFIG, 3, torch.device("meta"))


@torch.no_grad()
@pytest.mark.parametrize("layer", ["memory", "mass", "conv"])
def test_a_step_that_is_refused_has_changed_nothing(layer: str) -> None:
    """The last tensor of its kind is the one that does not fit, so that all before it would have been written."""
    model, state = RamNetForCausalLM(CONFIG), random_state()
    getattr(state, layer)[-1] = getattr(state, layer)[-1].mT.contiguous().mT
    before = state.clone()
    with pytest.raises(ValueError, match="only a contiguous state"):
        model(torch.zeros(3, 1, dtype=torch.int64), state, in_place=True)
    assert equal(state, before)


def test_what_a_prompt_leaves_holds_none_of_its_memory() -> None:
    model = RamNetForCausalLM(CONFIG)
    with torch.no_grad():
        state = model(torch.zeros(1, 500, dtype=torch.int64)).state
    assert all(x.untyped_storage().nbytes() == x.nbytes for x in state.tensors().values())


def test_a_file_is_as_large_after_a_trillion_tokens_as_before_the_first(tmp_path: Path) -> None:
    RamState.zeros(CONFIG, 3).save(tmp_path / "first")
    random_state().save(tmp_path / "late")
    assert (tmp_path / "first").stat().st_size == (tmp_path / "late").stat().st_size


def test_batch_size_must_be_positive() -> None:
    with pytest.raises(ValueError, match="batch_size is 0; it must be at least 1"):
        RamState.zeros(CONFIG, 0)


def test_a_missing_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=re.escape(f"{tmp_path / 'none'} is not a file")):
        RamState.load(tmp_path / "none")


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"position": None}, "it holds conv.0, mass.0, mass.1, memory.0"),
        ({"position": None, "weight": torch.zeros(3)}, "it holds conv.0, mass.0, mass.1, memory.0"),
        ({"memory.0": None}, "it holds conv.0, mass.0, mass.1, memory.1"),
        ({"mass.1": None}, "it holds conv.0, mass.0, memory.0, memory.1"),
        ({"memory.0": None, "memory.1": None, "mass.0": None, "mass.1": None}, "it holds conv.0, position"),
        ({"weight": torch.zeros(3)}, "it holds conv.0"),
        ({"position": torch.zeros(2, dtype=torch.int64)}, "position is torch.int64 [2]"),
        ({"position": torch.tensor(0.5)}, "position is torch.float32 [3]"),
        ({"mass.1": torch.zeros(3)}, "mass.1 is torch.float32 [3]"),
        ({"memory.1": torch.zeros(1, 2, 3, 4, dtype=torch.int32)}, "memory.1 is torch.int32 [1, 2, 3, 4]"),
    ],
)
def test_a_foreign_file_is_named_with_what_it_holds(
    changes: dict[str, torch.Tensor | None], message: str, tmp_path: Path
) -> None:
    path = tmp_path / "s.safetensors"
    tensors = {name: x for name, x in (random_state().tensors() | changes).items() if x is not None}
    save_file(tensors, path)
    before = path.read_bytes()
    with pytest.raises(ValueError, match=re.escape(f"{path} is not a RAM-Net state: {message}")):
        RamState.load(path)
    assert path.read_bytes() == before


@settings(max_examples=300)
@given(at=st.integers(0, 10**6), byte=st.integers(0, 255), cut=st.booleans())
def test_a_corrupted_file_loads_as_a_state_or_is_refused_by_name(
    tmp_path_factory: pytest.TempPathFactory, at: int, byte: int, cut: bool
) -> None:
    path = tmp_path_factory.getbasetemp() / "corrupted.safetensors"
    random_state(1).save(path)
    content = bytearray(path.read_bytes())
    header = 8 + int.from_bytes(content[:8], "little")
    if cut:
        content = content[: at % len(content)]
    else:
        content[at % header] = byte
    path.write_bytes(content)
    try:
        state = RamState.load(path)
    except ValueError as error:
        assert str(path) in str(error) and "\n" not in str(error)
    else:
        assert not cut and len(state.memory) == 2


def test_a_full_disk_keeps_the_old_session(tmp_path: Path) -> None:
    path = tmp_path / "s.safetensors"
    RamState.zeros(CONFIG, 3).save(path)
    with full_disk(after=1000), pytest.raises(OSError, match=re.escape(f"{path} cannot be written: ")):
        random_state().save(path)
    assert equal(RamState.load(path), RamState.zeros(CONFIG, 3))
    assert [path.name for path in tmp_path.iterdir()] == ["s.safetensors"]
    assert load_file(path).keys() == random_state().tensors().keys()
