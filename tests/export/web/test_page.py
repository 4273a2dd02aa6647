"""The page in headless Chromium writes what PyTorch generates, shows the memory, and works without a network."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch

from ramnet.files import read_text
from tests.export.conftest import Exported
from tests.export.web.conftest import CONFIG
from tests.lowering.aot.c_library import eager_logits, error, model_of

pytest.importorskip("tvm", reason="the CPU kernels need tvm: pip install 'ramnet[tvm]'")

PACKAGES = Path(__file__).parents[3] / "build" / "node_modules"
CHROMIUM = shutil.which("chromium")
PROMPT = "A text, "


def package(name: str) -> None:
    if not (PACKAGES / name).is_dir():
        pytest.skip(f"{name} is not installed: npm install --prefix build {name}")


@pytest.mark.skipif(CHROMIUM is None, reason="chromium is not installed")
def test_the_page_writes_what_pytorch_generates(bundle: Callable[[str], Path]) -> None:
    package("playwright-core")
    model, prompt = model_of(CONFIG), torch.tensor([list(PROMPT.encode())])
    found = browse(bundle("float32"), PROMPT, 40)
    for text, count in ((found["text"], 40), (found["more"], 45), (found["offline"], 40)):
        want = bytes(model.generate(prompt, count, temperature=0)[0].tolist()).decode(errors="replace")
        assert text == want.replace("\r\n", "\n").replace("\r", "\n")
    # A browser's clock has steps of 0.1 ms, in which this model can write five tokens: then the page shows no speed.
    assert re.fullmatch(r"5 tokens(, [\d,.]+ tokens/s)?; the model has read 53 tokens", found["status"])
    assert found["colours"] == ["41b3e3", "50b93f", "727bff"], "the dark colours of both, read and written, as bgr"
    assert "move (CAPE); the last token read slots " in found["label"] and "and wrote slots " in found["label"]
    ways = ["move (CAPE)", "move (CAPE)", "stay", "stay"]
    assert found["captions"] == [f"Head {head}: addresses {way}" for head, way in enumerate(ways, start=1)]
    assert found["heights"] == [2 * 256] * 2 and found["second"]["heights"] == [2 * 16] * 4, "two pixels for a slot"
    assert found["second"]["colours"] == found["colours"]
    read, written = re.findall(r"slots ((?:\d+, )*\d+)", found["second"]["label"])
    assert all(0 <= int(slot) < 16 for side in (read, written) for slot in side.split(", "))
    assert found["about"].startswith("A language model of 2 layers, each with 2/4 memories of 256/16 slots,")
    assert found["loaded"] == "Loaded a memory of 53 tokens; type what follows them"
    assert found["position"].endswith("the model has read 55 tokens")
    assert found["refused"] == "the state file is not a safetensors file, or it was cut"
    stopped = re.fullmatch(r"(\d+) tokens, [\d,.]+ tokens/s; the model has read \d+ tokens", found["stopped"])
    assert stopped and 100 - len(found["after"]) <= int(stopped[1]) < 1_000_000
    assert found["damaged"] == "weights.safetensors is damaged: its SHA-256 digest is not that of ramnet.json"
    assert found["errors"] == []


def browse(folder: Path, *arguments: object) -> dict:
    script = Path(__file__).with_name("browser.mjs")
    command = ["node", script, folder, PACKAGES, *map(str, arguments)]
    done = subprocess.run(command, capture_output=True, text=True, env={**os.environ, "CHROMIUM": str(CHROMIUM)})
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


def test_the_same_model_by_onnxruntime_web_writes_the_same(mixed: Exported) -> None:
    package("onnxruntime-web")
    prompt = list(PROMPT.encode())
    done = subprocess.run(
        ["node", Path(__file__).with_name("onnx.mjs"), mixed.onnx, PACKAGES, json.dumps(prompt), "20"],
        capture_output=True, text=True,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    assert found["ids"] == mixed.model.generate(torch.tensor([prompt]), 20, temperature=0)[0, len(prompt) :].tolist()
    assert found["position"] == len(prompt) + 20
    first = np.array(found["logits"], np.float32)[None]
    assert error(first, eager_logits(mixed.model, np.array(found["ids"][:1]))) < 1e-5
    names = json.loads(read_text(mixed.onnx / "ramnet.json"))["config"]
    assert all(0 <= slot < names["sub_dim"][0] ** names["order"][0] for slot in found["slots"])
