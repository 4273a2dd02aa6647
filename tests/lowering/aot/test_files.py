"""State files are those of ``RamState``; a wrong file or argument is one sentence, and changes nothing."""

from __future__ import annotations

import ctypes
import json
import struct
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from lowering.aot import weights
from ramnet import RamState
from tests.lowering.aot.c_library import TINY, CLibrary, eager_logits, error, ids_of, model_of

pytest.importorskip("tvm", reason="the CPU kernels need tvm: pip install 'ramnet[tvm]'")


@pytest.fixture(scope="module")
def library(tmp_path_factory: pytest.TempPathFactory) -> CLibrary:
    return CLibrary(model_of(TINY), tmp_path_factory.mktemp("weights"))


def test_a_session_continues_in_pytorch_and_back(library: CLibrary, tmp_path: Path) -> None:
    model, ids = model_of(TINY), ids_of(30, TINY.vocab_size)
    want = eager_logits(model, ids)
    state = library.state()
    library.tokens(state, ids[:10], 0)
    library.call("state_save", state, str(tmp_path / "c").encode())
    with torch.no_grad():
        out = model(torch.from_numpy(ids[10:20].astype(np.int64))[None], RamState.load(tmp_path / "c"))
    assert error(out.logits[0].numpy(), want[10:20]) < 1e-5
    out.state.save(tmp_path / "python")
    again = library.state()
    library.call("state_load", again, str(tmp_path / "python").encode())
    assert error(library.tokens(again, ids[20:], 10), want[20:]) < 1e-5
    assert names(tmp_path) == ["c", "python"]


def test_a_state_in_memory_is_the_same_file(library: CLibrary, tmp_path: Path) -> None:
    state, again = library.state(), library.state()
    library.token(state, 5)
    library.call("state_save", state, str(tmp_path / "state").encode())
    file = (tmp_path / "state").read_bytes()
    assert library.c.ramnet_state_bytes(state) == len(file)
    written = ctypes.create_string_buffer(len(file))
    library.c.ramnet_state_write(state, written)
    assert written.raw == file
    library.call("state_read", again, file, ctypes.c_size_t(len(file)))
    assert np.array_equal(library.token(again, 6), library.token(state, 6))
    with pytest.raises(RuntimeError, match="the state file was cut"):
        library.call("state_read", again, file, ctypes.c_size_t(len(file) - 1))


def test_weights_in_memory_are_used_where_they_are(library: CLibrary) -> None:
    file, model = np.fromfile(library.weights, np.uint8), ctypes.c_void_p()
    at = np.empty(len(file) + 16, np.uint8)
    first = -at.ctypes.data % 8
    at[first : first + len(file)] = file
    address, size = at.ctypes.data + first, ctypes.c_size_t(len(file))
    with pytest.raises(RuntimeError, match="it must be a multiple of 8"):
        library.call("open_bytes", ctypes.c_void_p(address + 4), size, 1, ctypes.byref(model))
    library.call("open_bytes", ctypes.c_void_p(address), size, 1, ctypes.byref(model))
    logits = np.empty(TINY.vocab_size, np.float32)
    library.call("token", model, library.state(), 5, logits.ctypes.data_as(ctypes.c_void_p))
    assert np.array_equal(logits, library.token(library.state(), 5))
    library.c.ramnet_close(model)


def test_a_clone_is_independent_and_a_reset_state_is_fresh(library: CLibrary) -> None:
    state, copy = library.state(), ctypes.c_void_p()
    first = library.token(state, 5)
    library.call("state_clone", state, ctypes.byref(copy))
    second = library.token(state, 6)
    assert np.array_equal(library.token(copy, 6), second)
    library.c.ramnet_state_reset(state)
    assert np.array_equal(library.token(state, 5), first)
    library.c.ramnet_state_free(copy)
    library.c.ramnet_state_free(state)


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def damaged(whole: bytes) -> dict[str, bytes]:
    """Return files that are no state of the model, by what the message says."""
    size = struct.unpack("<Q", whole[:8])[0]
    header: dict[str, Any] = json.loads(whole[8 : 8 + size])

    def with_header(change: dict[str, Any]) -> bytes:
        made = json.dumps({**header, **change}).encode()
        return struct.pack("<Q", len(made) + -len(made) % 8) + made + b" " * (-len(made) % 8) + whole[8 + size :]

    memory = header["memory.0"]
    fewer = [*memory["shape"][:3], memory["shape"][3] // 2]
    position = whole.index(b"position")
    assert position < size
    begin = 8 + size + header["position"]["data_offsets"][0]
    return {
        "too short": b"",
        "was cut": whole[:-5],
        "not a safetensors file, or": whole[: size // 2],
        "not a safetensors file": b"\xff" * 64,
        "damaged header": whole[:8] + whole[8 : 8 + size].replace(b'"shape"', b'"shade"') + whole[8 + size :],
        "another shape": with_header({"memory.0": {**memory, "shape": fewer}}),
        "of another shape or type": with_header({"memory.0": {**memory, "dtype": "I32"}}),
        "not where its shape says": with_header({"memory.0": {**memory, "data_offsets": [0, 8]}}),
        "a state of this model has": with_header({"more": {"dtype": "F32", "shape": [0], "data_offsets": [0, 0]}}),
        "no tensor mass.1": whole.replace(b'"mass.1"', b'"mess.1"'),
        "at position -1": whole[:begin] + b"\xff" * 8 + whole[begin + 8 :],
        "at position 4611686018427387905": whole[:begin] + (2**62 + 1).to_bytes(8, "little") + whole[begin + 8 :],
    }


def test_a_damaged_state_is_refused_and_changes_nothing(library: CLibrary, tmp_path: Path) -> None:
    state = library.state()
    library.token(state, 5)
    library.call("state_save", state, str(tmp_path / "good").encode())
    files = damaged((tmp_path / "good").read_bytes())
    for problem, content in files.items():
        (tmp_path / "bad").write_bytes(content)
        with pytest.raises(RuntimeError, match=f"bad.*({problem}|not a safetensors file)" if not content else problem):
            library.call("state_load", state, str(tmp_path / "bad").encode())
    with pytest.raises(RuntimeError, match="missing cannot be opened: No such file"):
        library.call("state_load", state, str(tmp_path / "missing").encode())
    again = library.state()
    library.token(again, 5)
    assert np.array_equal(library.token(state, 6), library.token(again, 6))


def test_weights_of_another_model_are_refused(library: CLibrary, tmp_path: Path) -> None:
    other = TINY.model_copy(update={"hidden_size": 32})
    save_file(weights.stored(model_of(other).state_dict(), other, "float32"), tmp_path / "other")
    model = ctypes.c_void_p()
    with pytest.raises(RuntimeError, match=r"embedding\.weight is F32 of another shape"):
        library.call("open", str(tmp_path / "other").encode(), 1, ctypes.byref(model))
    with pytest.raises(RuntimeError, match="threads is 0"):
        library.call("open", str(library.weights).encode(), 0, ctypes.byref(model))


def test_weights_with_an_altered_byte_or_of_another_configuration_are_refused(
    library: CLibrary, tmp_path: Path
) -> None:
    path, stored = tmp_path / "weights", weights.stored(model_of(TINY).state_dict(), TINY, "float32")
    weights.save(path, stored, TINY)
    whole = path.read_bytes()
    data = 8 + int.from_bytes(whole[:8], "little")

    def opened(content: bytes) -> None:
        path.write_bytes(content)
        model = ctypes.c_void_p()
        library.call("open", str(path).encode(), 1, ctypes.byref(model))
        library.c.ramnet_close(model)

    opened(whole)
    for at in (data, data + 5, (data + len(whole)) // 2, len(whole) - 1):
        altered = bytearray(whole)
        altered[at] ^= 0x80
        with pytest.raises(RuntimeError, match="weights is damaged: its data was altered"):
            opened(altered)
    with pytest.raises(RuntimeError, match="its data was altered"):  # words in another order
        opened(whole[:data] + whole[data + 8 : data + 16] + whole[data : data + 8] + whole[data + 16 :])
    weights.save(path, stored, TINY.model_copy(update={"decay_power": 2.0}))
    with pytest.raises(RuntimeError, match="weights is of another model"):
        opened(path.read_bytes())


def test_threads_that_save_to_one_path_leave_the_state_of_one(library: CLibrary, tmp_path: Path) -> None:
    states = [library.state() for _ in range(4)]
    for id_, state in enumerate(states):
        library.token(state, id_)
        library.call("state_save", state, str(tmp_path / f"alone {id_}").encode())
    alone = {(tmp_path / f"alone {id_}").read_bytes() for id_ in range(4)}
    path = tmp_path / "shared"

    def save(state: ctypes.c_void_p) -> None:
        for _ in range(10):
            library.call("state_save", state, str(path).encode())
            assert path.read_bytes() in alone

    with ThreadPoolExecutor(4) as pool:
        list(pool.map(save, states))
    assert names(tmp_path) == ["alone 0", "alone 1", "alone 2", "alone 3", "shared"]


def test_a_state_that_cannot_be_written_is_reported(library: CLibrary, tmp_path: Path) -> None:
    with pytest.raises(RuntimeError, match="cannot be written: No such file"):
        library.call("state_save", library.state(), str(tmp_path / "no folder" / "state").encode())
    (tmp_path / "folder").mkdir()
    with pytest.raises(RuntimeError, match="cannot be written: Is a directory"):
        library.call("state_save", library.state(), str(tmp_path / "folder").encode())
    assert names(tmp_path) == ["folder"]


def test_arguments_out_of_range_are_refused_before_anything_is_read(library: CLibrary) -> None:
    state = library.state()
    for token in (-1, TINY.vocab_size):
        with pytest.raises(RuntimeError, match=rf"id 0 is {token}; it must be in 0\.\.255"):
            library.token(state, token)
    with pytest.raises(RuntimeError, match="last is 3; it must be in"):
        library.tokens(state, ids_of(2, 9), 3)
    with pytest.raises(RuntimeError, match="states 0 and 1 are the same"):
        library.step([state, state], ids_of(2, 9))
    with pytest.raises(RuntimeError, match="id 40 is 300"):
        library.tokens(state, np.array([1] * 40 + [300], np.int32), 1)
    assert library.c.ramnet_state_position(state) == 0
