"""A state file that one runtime writes, every other reads.

ExecuTorch's programs read and write them as PyTorch does, through ``RamState``; see ``test_executorch``.
"""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch

from export.onnx.session import OnnxSession
from export.onnx.state import OnnxState
from ramnet import RamNetForCausalLM, RamState
from tests.export.conftest import Exported
from tests.export.web.test_node import node
from tests.lowering.aot.c_library import error, ids_of

pytest.importorskip("tvm", reason="the C library needs tvm: pip install 'ramnet[tvm]'")

# Reads a state file, then tokens, and writes a state file; returns the logits.
Run = Callable[[Path, list[int], Path], np.ndarray]


@pytest.fixture(scope="module")
def runtimes(export_named: Callable[[str], Exported], tmp_path_factory: pytest.TempPathFactory) -> dict[str, Run]:
    folder, made = tmp_path_factory.mktemp("exports"), export_named("mixed")
    return {
        "PyTorch": pytorch(made.model),
        "C": c(made.model, folder),
        "ONNX Runtime": onnx(made.onnx),
        "JavaScript": javascript(made.model, folder / "web"),
    }


def pytorch(model: RamNetForCausalLM) -> Run:
    @torch.no_grad()
    def run(path: Path, ids: list[int], to: Path) -> np.ndarray:
        out = model(torch.tensor([ids]), RamState.load(path))
        out.state.save(to)
        found: np.ndarray = out.logits.numpy()
        return found

    return run


def c(model: RamNetForCausalLM, folder: Path) -> Run:
    from export.c.session import CModel
    from lowering.aot import build, weights

    stored = weights.stored(model.state_dict(), model.config, "float32")
    weights.save(folder / "weights", stored, model.config)
    library = CModel(build.shared_library(model.config), folder / "weights")

    def run(path: Path, ids: list[int], to: Path) -> np.ndarray:
        state = library.state()
        state.load(path)
        found = library.tokens(state, ids, len(ids))
        state.save(to)
        return found

    return run


def onnx(folder: Path) -> Run:
    session = OnnxSession(folder, threads=1)

    def run(path: Path, ids: list[int], to: Path) -> np.ndarray:
        out = session(torch.tensor([ids]), OnnxState.load(path))
        out.state.save(to)
        found: np.ndarray = out.logits.numpy()
        return found

    return run


def javascript(model: RamNetForCausalLM, folder: Path) -> Run:
    from export.web import export_web

    for program in ("clang", "wasm-ld", "node"):
        if shutil.which(program) is None:
            pytest.skip(f"{program} is not installed")
    export_web(model, folder)
    return lambda path, ids, to: np.array(node(folder, "resume", path, to, ids)["logits"], np.float32)


@torch.no_grad()
def test_every_runtime_reads_the_state_files_of_all_others(
    runtimes: dict[str, Run], mixed: Exported, tmp_path: Path
) -> None:
    ids = ids_of(14, 256)
    want = mixed.model(torch.from_numpy(ids.astype(np.int64))[None]).logits[0, 10:].numpy()
    start, rounded = tmp_path / "start", tmp_path / "rounded"
    RamState.zeros(mixed.model.config, 1).save(start)
    files = {name: tmp_path / name for name in runtimes}
    for name, run in runtimes.items():
        run(start, ids[:10].tolist(), files[name])
    state = RamState.load(files["PyTorch"])
    tensors = ([x.bfloat16() for x in each] for each in (state.memory, state.mass, state.conv))
    RamState(*tensors, state.position).save(rounded)  # as that of a bfloat16 model is
    for path, tolerance in [*((path, 1e-5) for path in files.values()), (rounded, 0.02)]:
        for name, run in runtimes.items():
            found = run(path, ids[10:].tolist(), tmp_path / "unused").reshape(want.shape)
            assert error(found, want) < tolerance, f"{name} from {path.name}"
