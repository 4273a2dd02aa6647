"""The weights of an export in fewer bits, onnxruntime's own format, and what lies beside the graphs."""

from __future__ import annotations

import copy
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import torch

import lowering
from export.onnx import graphs, verify
from export.onnx.build import VerificationError, export_onnx
from export.onnx.runtime import OnnxGraph
from export.onnx.session import OnnxSession, run_copying
from export.onnx.sidecar import Sidecar
from export.onnx.state import OnnxState
from export.samples import Samples
from ramnet import RamNetForCausalLM
from ramnet.files import sha256
from tests.export.conftest import Exported, checked_card

TOLERANCE = 2e-5  # float32 sums in another order


@pytest.fixture(autouse=True)
def few_checks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(verify, "LENGTHS", (1, 7))
    monkeypatch.setattr(verify, "STEPS", 8)


@pytest.mark.parametrize(("precision", "size"), [("float16", 0.55), ("int8", 0.45)])
@torch.no_grad()
def test_weights_in_fewer_bits_give_nearly_the_same_logits(
    mixed: Exported, tmp_path: Path, quick_build: None, precision: str, size: float
) -> None:
    checks = export_onnx(mixed.model, tmp_path / "onnx", precision=precision, ort=True)
    sidecar = Sidecar.load(tmp_path / "onnx")
    assert sidecar.precision == precision
    assert max(sidecar.largest_errors.values()) <= verify.TOLERANCES[precision]
    assert max(check.logits for check in checks) > TOLERANCE, "weights are rounded"
    assert 0.9 < sidecar.agreement == sum(check.agreement for check in checks) / len(checks)
    operators = [node.op_type for node in onnx.load(tmp_path / "onnx" / "decode.onnx").graph.node]
    assert ("MatMulNBits" in operators) == ("MatMul" not in operators) == (precision == "int8")
    assert (tmp_path / "onnx" / "weights.bin").stat().st_size < size * (mixed.onnx / "weights.bin").stat().st_size

    # The same graphs in onnxruntime's own format.
    session, ids = OnnxSession(tmp_path / "onnx", threads=1), torch.tensor([[5, 6, 7]])
    found, _ = run_copying(OnnxGraph(tmp_path / "onnx" / "prefill.ort", 1), ids, OnnxState.zeros(session.config, 1))
    torch.testing.assert_close(found.logits, session.prefill(ids).logits, atol=1e-4, rtol=0)


def test_a_precision_that_is_unknown_is_named(mixed: Exported, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="precision is 'int3'; it must be one of float32, float16, int8"):
        export_onnx(mixed.model, tmp_path / "onnx", precision="int3")


def test_a_graph_beyond_its_precisions_tolerance_is_not_written(
    mixed: Exported, tmp_path: Path, quick_build: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(verify.TOLERANCES, "int8", 1e-4)
    with pytest.raises(VerificationError, match="nothing was written"):
        export_onnx(mixed.model, tmp_path / "onnx", precision="int8")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("compiled", [lowering.compile, torch.compile])
def test_a_compiled_model_is_exported_as_what_was_compiled(
    mixed: Exported, tmp_path: Path, quick_build: None, compiled: Callable[[Any], Any]
) -> None:
    checks = export_onnx(compiled(mixed.model), tmp_path / "onnx")
    assert max(check.error for check in checks) < TOLERANCE
    assert Sidecar.load(tmp_path / "onnx").config == mixed.model.config


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_a_model_of_another_type_is_exported_in_float32(
    mixed: Exported, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, dtype: torch.dtype
) -> None:
    built: list[RamNetForCausalLM] = []

    def build(model: RamNetForCausalLM, kind: str, kernels: bool) -> None:
        built.append(model)
        raise KeyboardInterrupt

    monkeypatch.setattr(graphs, "build", build)
    model = copy.deepcopy(mixed.model).to(dtype)
    with pytest.raises(KeyboardInterrupt):
        export_onnx(model, tmp_path / "onnx")
    for name, weight in built[0].state_dict().items():
        assert torch.equal(weight, model.state_dict()[name].float())
        assert weight.dtype == torch.float32


@torch.no_grad()
def test_samples_are_repeated_by_pytorch_and_by_decoding(exported: Exported) -> None:
    samples, session = Samples.load(exported.onnx), OnnxSession(exported.onnx, threads=1)
    ids, logits = torch.from_numpy(samples.ids.astype(np.int64))[None], torch.from_numpy(samples.logits)[None]
    assert float((exported.model(ids).logits - logits).abs().max()) < TOLERANCE
    state = OnnxState.zeros(session.config, 1)
    steps = torch.cat([session.step(token, state) for token in ids.split(1, dim=1)], 1)
    assert float((steps - logits).abs().max()) < TOLERANCE


def test_the_card_and_the_description_say_the_first_state_and_how_text_becomes_ids(
    exported: Exported,
) -> None:
    sidecar, text = Sidecar.load(exported.onnx), (exported.onnx / "README.md").read_text()
    config = exported.model.config
    slots = [layer.slots for layer in config.layers]
    if len(set(slots)) == 1:
        assert sidecar.initial_state["mass"] == 1 / slots[0]
        assert f"every element of each mass is 1/{slots[0]}" in text
    else:
        assert sidecar.initial_state["mass"] == [1 / m for m in slots]
        assert f"every element of each mass is 1/M, where the M of the layers are {', '.join(map(str, slots))}" in text
        assert f"layer 0 has {config.num_heads[0]} heads with {slots[0]} slots" in text
    assert ("conv" in sidecar.initial_state) == (config.conv_layers > 0)
    assert sidecar.text == ("bytes" if config.vocab_size == 256 else None)
    assert ("Each byte of the UTF-8 text is one id" in text) == (config.vocab_size == 256)
    for name in sidecar.files.keys() - {"README.md"}:
        assert re.search(rf"\| {re.escape(name)} \| .* \| [0-9.]+ [KM]B \|", text)


def test_the_cards_code_runs(mixed: Exported, monkeypatch: pytest.MonkeyPatch) -> None:
    code = checked_card(mixed.onnx)
    monkeypatch.chdir(mixed.onnx)
    scope: dict[str, Any] = {}
    exec(code["python"], scope)
    assert scope["logits"].shape == (1, 1, 256)


def test_every_file_of_the_folder_has_its_digest(exported: Exported) -> None:
    here = {path.name: sha256(path) for path in exported.onnx.iterdir() if path.name != "ramnet.json"}
    assert Sidecar.load(exported.onnx).files == here


def test_links_of_a_hubs_cache_are_followed(mixed: Exported, tmp_path: Path) -> None:
    """Snapshots of a hub link each file to a blob that is named by a digest, in another folder."""
    snapshot, blobs = tmp_path / "snapshots" / "1", tmp_path / "blobs"
    snapshot.mkdir(parents=True)
    blobs.mkdir()
    for path in mixed.onnx.iterdir():
        shutil.copy(path, blobs / sha256(path))
        (snapshot / path.name).symlink_to(f"../../blobs/{sha256(path)}")
    ids = torch.tensor([[1, 2, 3]])
    assert torch.equal(OnnxSession(snapshot)(ids).logits, OnnxSession(mixed.onnx)(ids).logits)
