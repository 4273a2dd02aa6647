"""States of exported models are saved and loaded where PyTorch is not installed, as PyTorch does it."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from export.onnx.state import OnnxState
from ramnet import RamNetConfig, RamState
from tests.export.conftest import CONFIGS


def random_state(dtype: torch.dtype = torch.float32) -> RamState:
    state = RamState.zeros(RamNetConfig(**CONFIGS["mixed"]), 2, dtype=dtype)
    torch.manual_seed(0)
    for tensor in (*state.memory, *state.mass, *state.conv):
        tensor.copy_(torch.randn(tensor.shape))
    state.position.copy_(torch.tensor([5, 2**40]))
    return state


def test_a_state_is_loaded_and_saved_in_a_process_without_torch(tmp_path: Path) -> None:
    random_state().save(tmp_path / "given")
    without = "import sys; sys.modules['torch'] = None; from export.onnx.state import OnnxState;"
    script = f"{without} OnnxState.load('given').save('saved')"
    path = os.pathsep.join(filter(None, [str(Path(__file__).parents[2]), os.environ.get("PYTHONPATH")]))
    subprocess.run([sys.executable, "-c", script], cwd=tmp_path, check=True, env={**os.environ, "PYTHONPATH": path})
    found = RamState.load(tmp_path / "saved").tensors()
    assert all(torch.equal(found[name], x) for name, x in random_state().tensors().items())
    (tmp_path / "usual").touch()
    assert (tmp_path / "saved").stat().st_mode == (tmp_path / "usual").stat().st_mode, "not for its owner alone"


@pytest.mark.parametrize("dtype", [torch.float64, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("position", [torch.tensor([5, 6], dtype=torch.int32), torch.tensor(7)])
def test_a_file_is_read_as_pytorch_reads_it(tmp_path: Path, dtype: torch.dtype, position: torch.Tensor) -> None:
    save_file(random_state(dtype).tensors() | {"position": position}, tmp_path / "state")
    found, want = OnnxState.load(tmp_path / "state"), OnnxState.of(RamState.load(tmp_path / "state"))
    assert found.tensors.keys() == want.tensors.keys()
    assert all(np.array_equal(found.tensors[name], x) for name, x in want.tensors.items())


@pytest.mark.parametrize(
    ("change", "message"),
    [({"weight": torch.zeros(3)}, "it holds conv.0, conv.1, mass.0, mass.1"),
     ({"memory.0": torch.zeros(2, 3, 8, 5, dtype=torch.int32)}, "memory.0 is I32 [2, 3, 8, 5]"),
     ({"mass.1": torch.zeros(2, 2, 36, dtype=torch.float8_e5m2)}, "mass.1 is F8_E5M2 [2, 2, 36]"),
     ({"position": torch.tensor([True, False])}, "position is BOOL [2]")],
)  # fmt: skip
def test_a_foreign_file_is_named_with_what_it_holds(
    tmp_path: Path, change: dict[str, torch.Tensor], message: str
) -> None:
    save_file(random_state().tensors() | change, tmp_path / "state")
    with pytest.raises(ValueError, match=re.escape(f"{tmp_path}/state is not a RAM-Net state: {message}")):
        OnnxState.load(tmp_path / "state")


def test_a_damaged_or_missing_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=re.escape(f"{tmp_path}/state is not a file")):
        OnnxState.load(tmp_path / "state")
    (tmp_path / "state").write_bytes(b"text")
    with pytest.raises(ValueError, match=re.escape(f"{tmp_path}/state is not a safetensors file")):
        OnnxState.load(tmp_path / "state")
