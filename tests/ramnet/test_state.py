"""RamState: a value that can be cloned, reordered, saved and loaded."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file

from ramnet import RamNetConfig, RamState
from tests.samples import full_disk

CONFIG = RamNetConfig.preset(
    "tiny", hidden_size=6, num_layers=2, conv_layers=1, num_heads=3, value_dim=5, order=3, sub_dim=3
)


def random_state(batch: int = 3) -> RamState:
    state = RamState.zeros(CONFIG, batch)
    generator = torch.Generator().manual_seed(0)
    for tensor in (*state.memory, *state.mass, *state.conv):
        tensor.copy_(torch.rand(tensor.shape, generator=generator))
    state.position.fill_(2**40)
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
    assert all(bool((x == torch.tensor(1 / 27, dtype=torch.float64)).all()) for x in state.mass)
    assert state.position.dtype == torch.int64 and int(state.position) == 0
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
    assert picked.batch_size == 4 and torch.equal(picked.position, state.position)
    for name, tensor in picked.tensors().items():
        if name != "position":
            assert torch.equal(tensor, torch.stack([state.tensors()[name][i] for i in (2, 0, 0, 1)]))
        tensor.zero_()
    assert equal(state, random_state())


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
    ("name", "tensor", "message"),
    [
        ("position", None, "it holds conv.0, mass.0, mass.1, memory.0"),
        ("memory.0", None, "it holds conv.0, mass.0, mass.1, memory.1"),
        ("weight", torch.zeros(3), "it holds conv.0"),
        ("position", torch.zeros(3, dtype=torch.int64), "position is torch.int64 [3]"),
        ("position", torch.tensor(0.5), "position is torch.float32 []"),
        ("mass.1", torch.zeros(3), "mass.1 is torch.float32 [3]"),
        ("memory.1", torch.zeros(1, 2, 3, 4, dtype=torch.int32), "memory.1 is torch.int32 [1, 2, 3, 4]"),
    ],
)
def test_a_foreign_file_is_named_with_what_it_holds(
    name: str, tensor: torch.Tensor | None, message: str, tmp_path: Path
) -> None:
    path = tmp_path / "s.safetensors"
    tensors = random_state().tensors()
    tensors.pop(name, None)
    if tensor is not None:
        tensors[name] = tensor
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
