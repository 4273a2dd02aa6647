"""The module in Node equals PyTorch and the C library; wrong files and arguments are one sentence."""

from __future__ import annotations

import gzip
import json
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import export.node
from export import quality
from export.manifest import Manifest
from export.quality import HeldOut
from export.web import export_web
from lowering.aot import wasm
from ramnet import RamNetConfig, RamNetForCausalLM, RamState
from tests.export.conftest import checked_card
from tests.export.web.conftest import CONFIG, IDS, LABELS
from tests.lowering.aot.c_library import CLibrary, eager_logits, error, ids_of, model_of

pytest.importorskip("tvm", reason="the CPU kernels need tvm: pip install 'ramnet[tvm]'")

SCRIPT = Path(__file__).with_name("node.mjs")
PROMPT = "A text of more than thirty-two bytes, "


def node(folder: Path, task: str, *arguments: object) -> Any:
    done = subprocess.run(["node", SCRIPT, folder, task, *map(str, arguments)], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


def test_float32_writes_what_pytorch_generates(bundle: Callable[[str], Path]) -> None:
    model, ids = model_of(CONFIG), ids_of(40, CONFIG.vocab_size)
    found = node(bundle("float32"), "write", PROMPT, 20, ids.tolist())
    prompt = list(PROMPT.encode())
    assert found["generated"] == model.generate(torch.tensor([prompt]), 25, temperature=0)[0, len(prompt) :].tolist()
    assert found["position"] == len(prompt) + 25, "the state has read what was generated"
    want = eager_logits(model, ids)
    for way in ("alone", "blocks"):
        assert error(np.array(found[way], np.float32).reshape(want.shape), want) < 1e-5


def test_the_cards_code_runs(bundle: Callable[[str], Path]) -> None:
    script = checked_card(bundle("float32"))["js"] + "console.log(logits.length, file.length > 1000);"
    done = subprocess.run(
        ["node", "--input-type=module", "-e", script], cwd=bundle("float32"), capture_output=True, text=True
    )
    assert done.stdout == "256 true\n", done.stderr


def test_the_bits_per_byte_are_those_of_the_c_library(
    bundle: Callable[[str], Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder, text = bundle("int8"), HeldOut("of a test", IDS, LABELS)
    model = model_of(CONFIG)
    library = CLibrary(model, tmp_path, "int8")
    want = quality.measure(model, text, lambda ids: library.tokens(library.state(), ids, len(ids)))
    found = Manifest.load(folder).quality
    assert found is not None and found.tokens == want.tokens == 3 * 39
    assert found.bits_per_byte == pytest.approx(want.bits_per_byte, rel=1e-3) != pytest.approx(found.float32, rel=1e-6)
    assert (found.float32, found.agreement) == (want.float32, pytest.approx(want.agreement, abs=0.05))
    card = (folder / "README.md").read_text()
    assert f"| int8, this export in Node | {found.bits_per_byte:.4f} | {100 * found.agreement:.1f} % |" in card
    monkeypatch.setattr(export.node, "_AT_ONCE", 2 * 40 * CONFIG.vocab_size)
    for logits, ids in zip(export.node.of_windows(folder, IDS, CONFIG.vocab_size), IDS, strict=True):
        assert error(logits.copy(), library.tokens(library.state(), ids.astype(np.int32), 40)) < 0.05


def test_int8_writes_what_the_c_library_does(bundle: Callable[[str], Path], tmp_path: Path) -> None:
    """Sums of integers are exact, and what surrounds them differs in the order of float32 additions only."""
    library, ids = CLibrary(model_of(CONFIG), tmp_path, "int8"), ids_of(40, CONFIG.vocab_size)
    found = node(bundle("int8"), "write", PROMPT, 20, ids.tolist())
    state = library.state()
    logits, text = library.tokens(state, np.frombuffer(PROMPT.encode(), np.uint8).astype(np.int32), 1)[0], []
    for _ in range(25):
        text.append(int(logits.argmax()))
        logits = library.token(state, text[-1])
    assert found["generated"] == text
    want = library.tokens(library.state(), ids, 40)
    for way in ("alone", "blocks"):
        difference = np.abs(np.array(found[way], np.float32).reshape(want.shape) - want)
        assert np.median(difference) < 1e-5 * np.abs(want).max()


def test_a_session_continues_from_pytorch_in_javascript_and_back(bundle: Callable[[str], Path], tmp_path: Path) -> None:
    model, ids = model_of(CONFIG), ids_of(30, CONFIG.vocab_size)
    want = eager_logits(model, ids)
    with torch.no_grad():
        model(torch.from_numpy(ids[:10].astype(np.int64))[None]).state.save(tmp_path / "python")
    found = node(bundle("float32"), "resume", tmp_path / "python", tmp_path / "javascript", ids[10:20].tolist())
    assert error(np.array(found["logits"], np.float32).reshape(10, -1), want[10:20]) < 1e-5
    assert found["position"] == 0 and found["freed"] == "the state was freed"
    assert found["unread"] == "ids is empty, and the state has read no token since it was made or loaded"
    state = RamState.load(tmp_path / "javascript")
    with torch.no_grad():
        out = model(torch.from_numpy(ids[20:].astype(np.int64))[None], state)
        before = model(torch.from_numpy(ids[:19].astype(np.int64))[None]).state
    assert error(out.logits[0].numpy(), want[20:]) < 1e-5
    slots = np.array(found["written"]).reshape(4, 4).tolist()  # [heads, top_k] of the last layer
    for head, written in enumerate(slots):
        changed = (before.mass[1][0, head] - state.mass[1][0, head]).abs() > 1e-3
        assert set() < set(changed.nonzero().flatten().tolist()) <= set(written)


def test_sampling_repeats_with_a_seed(bundle: Callable[[str], Path]) -> None:
    found = node(bundle("float32"), "sample")
    assert found["first"] == found["again"] != found["other"]
    assert found["greedy"] == found["narrow"] and len(found["greedy"]) == 40


def test_wrong_files_and_arguments_are_one_sentence(bundle: Callable[[str], Path]) -> None:
    found = node(bundle("float32"), "refuse")
    assert found["same"] and found["finite"]
    wanted = {
        "weights": "weights.safetensors is damaged: its SHA-256 digest is not that of ramnet.json",
        "module": "ramnet.wasm is damaged: its SHA-256 digest is not that of ramnet.json",
        "page": "ramnet.js is damaged: its SHA-256 digest is not that of ramnet.json",
        "json": "ramnet.json is damaged: ",
        "format": "ramnet.json does not describe an exported model",
        "unnamed": "ramnet.json names no ramnet.wasm",
        "outside": "ramnet.json names ../x, which is no file beside it",
        "missing": " is missing",
        "folder": "ramnet.json cannot be read: ENOENT",
        "compile": "ramnet.wasm cannot be compiled, which needs WebAssembly SIMD: ",
        "cut": "the weights file was cut: ",
        "id": "id 0 is 256; it must be in 0..255",
        "fraction": "id is 1.5; it must be a whole number",
        "large": "id is 4294967296; it must be a whole number",
        "ids": "id 1 is -1; it must be in 0..255",
        "last": "last is 2; it must be in 0..1, the count",
        "none": "ids is null; it must be an array",
        "text": "ids is abc; it must be an array",
        "holes": "id 1 is undefined; it must be a whole number",
        "much": "there is no memory for 4294967300 bytes",
        "nothing": "ids is null; it must be an array",
        "layer": "layer is 9; it must be in 0..1",
        "stranger": "the state is of another model",
        "state": "the state file is not a safetensors file, or it was cut",
        "empty": "ids is empty, and the state has read no token",
        "temperature": "temperature is -1; it must be at least 0 and finite",
        **{f"nan {i}": "the largest logit is NaN; it must be finite" for i in range(3)},
    }
    assert found["answers"].keys() == wanted.keys()
    for name, answer in found["answers"].items():
        assert wanted[name] in answer and "\n" not in answer, f"{name}: {answer}"


def test_all_but_the_weights_is_small_and_needs_nothing(bundle: Callable[[str], Path]) -> None:
    folder = bundle("int8")
    assert node(folder, "imports") == []
    parts = [path for path in folder.iterdir() if path.name != "weights.safetensors"]
    assert sum(len(gzip.compress(path.read_bytes())) for path in parts) < 150_000


def test_missing_tools_are_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(RuntimeError, match=r"clang is not installed.*apt-get install clang lld wasi-libc"):
        wasm.write_wasm(CONFIG, "float32", tmp_path / "ramnet.wasm")
    assert list(tmp_path.iterdir()) == []


def test_a_state_larger_than_the_memory_of_webassembly_is_refused(tmp_path: Path) -> None:
    config = RamNetConfig(
        vocab_size=3, hidden_size=4, num_layers=1, num_heads=1, value_dim=32, order=12, sub_dim=4, top_k=2
    )
    refused = r"^a state of the model has 2\.2 GB; in WebAssembly it must be below 2\.1 GB$"
    with pytest.raises(ValueError, match=refused):
        export_web(RamNetForCausalLM(config), tmp_path / "web")
    assert list(tmp_path.iterdir()) == []
