"""RamState is saved and loaded whole, and damaged or foreign files are refused by name."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file

from ramnet import RamState
from tests.ramnet.states import CONFIG, check, equal, random_state
from tests.samples import full_disk


def test_a_file_with_one_position_for_all_rows_is_read(tmp_path: Path) -> None:
    tensors = random_state().tensors() | {"position": torch.tensor(41)}
    save_file(tensors, tmp_path / "old")
    loaded = RamState.load(tmp_path / "old")
    assert loaded.position.tolist() == [41, 41, 41] and loaded.position.dtype == torch.int64
    assert equal(loaded, RamState(loaded.memory, loaded.mass, loaded.conv, torch.full((3,), 41)))
    check(loaded, in_place=True)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.float16])
def test_saving_and_loading_restores_the_state(dtype: torch.dtype, tmp_path: Path) -> None:
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


def test_a_loaded_state_is_aligned_and_independent_of_its_file(tmp_path: Path) -> None:
    random_state().save(tmp_path / "s")
    loaded = RamState.load(tmp_path / "s")
    assert all(tensor.data_ptr() % 64 == 0 for tensor in loaded.tensors().values())
    content = (tmp_path / "s").read_bytes()
    with (tmp_path / "s").open("r+b") as file:  # overwrite the file in place instead of replacing it
        file.write(b"\0" * len(content))
    assert equal(loaded, random_state())


def test_the_size_of_a_file_does_not_depend_on_the_position(tmp_path: Path) -> None:
    RamState.zeros(CONFIG, 3).save(tmp_path / "first")
    random_state().save(tmp_path / "late")
    assert (tmp_path / "first").stat().st_size == (tmp_path / "late").stat().st_size


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


def test_only_what_can_be_loaded_is_saved_also_if_layers_share_it(tmp_path: Path) -> None:
    zeros = RamState.zeros(CONFIG, 2)
    shared = RamState([zeros.memory[0]] * 2, [zeros.mass[0]] * 2, zeros.conv, zeros.position)
    shared.save(tmp_path / "shared")
    assert equal(RamState.load(tmp_path / "shared"), shared)
    for wrong in (
        RamState([], [], [], zeros.position),
        RamState([zeros.memory[0].long()], [zeros.mass[0]], [], zeros.position),
    ):
        with pytest.raises(ValueError, match="wrong is not a RAM-Net state"):
            wrong.save(tmp_path / "wrong")
    with pytest.raises(OSError, match="it is not the name of a file"):
        zeros.save("")
    assert [path.name for path in tmp_path.iterdir()] == ["shared"]
