"""Models exported once for all tests of this folder."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch

from export.onnx import graphs
from export.onnx.build import export_onnx
from ramnet import RamNetConfig, RamNetForCausalLM
from ramnet.files import locked

CONFIGS: dict[str, dict[str, Any]] = {
    # Layers of odd and different sizes; CAPE on one of three heads, then on none; a byte-level vocabulary.
    "mixed": {
        "vocab_size": 256, "hidden_size": 21, "num_layers": 2, "num_heads": [3, 2], "value_dim": [5, 4],
        "order": [3, 2], "sub_dim": [3, 6], "top_k": [4, 7], "decay_power": 0.5, "cape_half_layers": 1,
        "intermediate_size": 34, "conv_layers": 2, "temperature": 0.7, "address_bias": "offsets",
    },
    # A layer of one head, one sub-vector and one slot per token, and one that touches every slot; CAPE on all heads.
    "extremes": {
        "vocab_size": 37, "hidden_size": 16, "num_layers": 2, "num_heads": [1, 2], "value_dim": [7, 4],
        "order": [1, 3], "sub_dim": [5, 2], "top_k": [1, 8], "decay_power": 0.0, "cape_full_layers": 2,
        "intermediate_size": 20, "tie_embeddings": True,
    },
    # A state much larger than the weights, and neither FFN nor convolution.
    "wide": {
        "vocab_size": 11, "hidden_size": 8, "num_layers": 1, "num_heads": 2, "value_dim": 3, "order": 5, "sub_dim": 4,
        "top_k": 8, "decay_power": 2.0, "cape_half_layers": 1,
    },
}  # fmt: skip


@dataclass(frozen=True)
class Exported:
    """A model, its checkpoint and its export."""

    model: RamNetForCausalLM
    checkpoint: Path
    onnx: Path


def make_model(name: str, seed: int = 0, **changes: Any) -> RamNetForCausalLM:
    """The model of ``CONFIGS[name]`` changed so, random, with scales other than 1 so that its addresses are sharp."""
    torch.manual_seed(seed)
    model = RamNetForCausalLM(RamNetConfig(**{**CONFIGS[name], **changes}, embedding_std=1.0)).eval()
    with torch.no_grad():
        for block in model.blocks:
            block.mixer.log_scale.uniform_(0.5, 1.5)
    return model


def assert_verified_without_torch(folder: Path) -> None:
    """Run ``ramnet verify`` in a process that cannot import PyTorch."""
    without = "import sys; sys.modules['torch'] = None; from export.cli import verify; verify()"
    done = subprocess.run([sys.executable, "-c", without, str(folder)], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert f"{folder} is as it was exported" in done.stdout


def checked_card(folder: Path) -> dict[str, str]:
    """Check the model card of an export. Returns its code by language."""
    text = (folder / "README.md").read_text()
    files = json.loads((folder / "ramnet.json").read_text())["files"]
    rows = dict(re.findall(r"^\| (\S+) \| .* \| [0-9.]+ [KM]B \| `([0-9a-f]{64})` \|$", text, re.MULTILINE))
    assert rows and rows.items() <= files.items()
    assert {"LICENSE", "samples.safetensors"} <= rows.keys()
    assert "The state before the first token is not all zeros" in text
    assert re.search(r"^\| time of a token \| \d+ µs, \d+ threads?, on .+ \|$", text, re.MULTILINE)
    assert re.search(r"^\| .*error of the logits against PyTorch.* \| \d\.\de-\d+ \|$", text, re.MULTILINE)
    return dict(re.findall(r"^```(\w+)\n(.*?)^```$", text, re.MULTILINE | re.DOTALL))


@pytest.fixture(scope="session")
def export_named(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Exported]:
    """Exports a model by name, once for all processes of a run: it takes some ten seconds."""
    pytest.importorskip("onnxruntime", reason="the export needs onnxruntime: pip install 'ramnet[export]'")
    base = tmp_path_factory.getbasetemp()
    shared = (base.parent if "PYTEST_XDIST_WORKER" in os.environ else base) / "exports"
    done: dict[str, Exported] = {}

    def export_once(name: str) -> Exported:
        if name not in done:
            made = Exported(make_model(name), shared / name, shared / name / "onnx")
            with locked(shared / f"{name}.lock"):
                if not made.onnx.exists():
                    made.model.save_pretrained(made.checkpoint)
                    export_onnx(made.model, made.onnx)
            done[name] = made
        return done[name]

    return export_once


@pytest.fixture(params=CONFIGS)
def exported(request: pytest.FixtureRequest, export_named: Callable[[str], Exported]) -> Exported:
    return export_named(request.param)


@pytest.fixture
def mixed(export_named: Callable[[str], Exported]) -> Exported:
    return export_named("mixed")


@pytest.fixture
def quick_build(mixed: Exported, monkeypatch: pytest.MonkeyPatch) -> None:
    """Reuse the graphs of the "mixed" model's export, to save time in tests of later stages."""
    import onnx_ir

    monkeypatch.setattr(graphs, "build", lambda model, name, kernels: onnx_ir.load(mixed.onnx / f"{name}.onnx"))
