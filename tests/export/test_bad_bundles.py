"""What is wrong with an export of any format is one sentence, before anything of it runs or is written, and what was
compiled is exported as what it is."""

from __future__ import annotations

import json
import shutil
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

import export.web
import lowering
from export import check, node, process
from export.c import build as c
from export.executorch import build as executorch
from export.executorch import kernels, program
from export.executorch.session import ExecutorchModel
from export.manifest import C_FORMAT, EXECUTORCH_FORMAT, WEB_FORMAT, Manifest, Speed
from export.samples import Samples
from lowering.aot import build, wasm
from ramnet import RamNetConfig, RamNetForCausalLM
from tests.export.test_build import entries
from tests.lowering.aot.c_library import model_of
from tests.samples import full_disk

pytest.importorskip("tvm", reason="the CPU kernels need tvm: pip install 'ramnet[tvm]'")
pytest.importorskip("executorch", reason="the export needs executorch: pip install 'ramnet[executorch]'")

CONFIG = RamNetConfig(
    vocab_size=256, hidden_size=16, num_layers=1, num_heads=2, value_dim=4, order=2, sub_dim=4, top_k=3,
    intermediate_size=24,
)  # fmt: skip
SPEED = Speed(token_seconds=1e-5, threads=1, processor="a processor")
FORMATS = {
    C_FORMAT: ("libramnet.so", "weights.safetensors"),
    EXECUTORCH_FORMAT: ("libramnet_executorch.so", "model.pte"),
    WEB_FORMAT: ("ramnet.js", "ramnet.wasm", "weights.safetensors"),
}


@pytest.fixture(params=FORMATS)
def bundle(request: pytest.FixtureRequest, tmp_path: Path) -> Path:
    """An export whose files are no code: what refuses it has not run them."""
    folder: Path = tmp_path / "bundle"
    folder.mkdir()
    for number, name in enumerate(FORMATS[request.param]):
        (folder / name).write_bytes(bytes([number]) * 100)
    facts = {"format": request.param, "precision": "float32", "target": "any"}
    Manifest.of(CONFIG, folder, ("ramnet",), **facts).save(folder)
    return folder


def changed(path: Path, change: Callable[[bytes], bytes]) -> None:
    path.write_bytes(change(path.read_bytes()))


def described(folder: Path, **fields: Any) -> None:
    changed(folder / "ramnet.json", lambda text: json.dumps({**json.loads(text), **fields}).encode())


DAMAGES: dict[str, tuple[Callable[[Path, list[str]], object], str]] = {
    "missing": (lambda folder, names: (folder / names[-1]).unlink(), "is incomplete: {last} is missing"),
    "empty": (lambda folder, names: changed(folder / names[-1], lambda _: b""), "{last} is damaged: it differs"),
    "cut": (lambda folder, names: changed(folder / names[-1], lambda x: x[:-1]), "{last} is damaged: it differs"),
    "longer": (lambda folder, names: changed(folder / names[-1], lambda x: x + b"0"), "{last} is damaged: it differs"),
    "altered": (
        lambda folder, names: changed(folder / names[0], lambda x: x[:50] + b"!" + x[51:]),
        "{first} is damaged: it differs",
    ),
    "swapped": (
        lambda folder, names: changed(folder / names[0], lambda _: (folder / names[-1]).read_bytes()),
        "{first} is damaged: it differs",
    ),
    "a folder": (
        lambda folder, names: ((folder / names[0]).unlink(), (folder / names[0]).mkdir()),
        "is incomplete: {first} is missing",
    ),
    "no description": (lambda folder, names: (folder / "ramnet.json").unlink(), "it has no ramnet.json"),
    "a cut description": (
        lambda folder, names: changed(folder / "ramnet.json", lambda x: x[: len(x) // 2]), "ramnet.json is damaged",
    ),
    "another format": (lambda folder, names: described(folder, format="ramnet-c-99"), "has the format 'ramnet-c-99'"),
    "another config": (
        lambda folder, names: described(folder, config=json.loads(CONFIG.to_json()) | {"top_k": 99}),
        "ramnet.json is damaged",
    ),
    "a file outside": (
        lambda folder, names: described(folder, files={"../x": "0"}), "it must name files of the folder",
    ),
    "an absolute path": (
        lambda folder, names: described(folder, files={"/etc/passwd": "0"}), "it must name files of the folder",
    ),
}  # fmt: skip


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_damaged_bundle_is_refused_in_one_sentence_before_its_code_runs(bundle: Path, damage: str) -> None:
    do, problem = DAMAGES[damage]
    description = json.loads((bundle / "ramnet.json").read_text())
    names = list(description["files"])
    do(bundle, names)
    readers = [check.check, ExecutorchModel] if description["format"] == EXECUTORCH_FORMAT else [check.check]
    for read in readers:
        with pytest.raises(ValueError) as caught:
            read(bundle)
        assert problem.format(first=names[0], last=names[-1]) in str(caught.value)
        assert str(bundle) in str(caught.value)
        assert "\n" not in str(caught.value)


def test_links_of_a_hubs_cache_are_followed(bundle: Path, tmp_path: Path) -> None:
    """Snapshots of a hub link each file to a blob in another folder."""
    blobs = tmp_path / "blobs"
    shutil.copytree(bundle, blobs)
    for path in bundle.iterdir():
        path.unlink()
        path.symlink_to(blobs / path.name)
    assert Manifest.load(bundle).config == CONFIG


EXPORTS: dict[str, Callable[[RamNetForCausalLM, Path], object]] = {
    "c": c.export_c,
    "executorch": executorch.export_executorch,
    "executorch with kernels": lambda model, folder: executorch.export_executorch(model, folder, kernels=True),
    "wasm": export.web.export_web,
}


@pytest.fixture
def quick(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Exports without compilers and runtimes, which write as much as they would."""
    ids = np.zeros(64, np.int32)
    samples = Samples(ids, np.zeros((64, 256), np.float32))

    def libraries(config: object, precision: str, machine: object, folder: Path, *loops: object) -> None:
        assert tmp_path not in folder.parents, "a linker on a full disk says so in many lines"
        for name in (c.LIBRARY, c.ARCHIVE, c.HEADER):
            (folder / name).write_bytes(bytes(20_000))

    class Run:
        threads = 1

        def __init__(self, *_: object) -> None:
            self.vocabulary = 256

        def state(self) -> None:
            return None

        def token(self, *_: object) -> None:
            return None

    monkeypatch.setattr(Samples, "of", lambda model: samples)
    monkeypatch.setattr(process, "check", lambda folder: 0.0)
    monkeypatch.setattr(build, "write_libraries", libraries)
    monkeypatch.setattr(wasm, "write_wasm", lambda config, precision, path: path.write_bytes(bytes(30_000)))
    monkeypatch.setattr(program, "write", lambda token, path: path.write_bytes(bytes(30_000)))
    monkeypatch.setattr(kernels, "write", lambda token, library: library.write_bytes(bytes(20_000)))
    monkeypatch.setattr(c, "CModel", Run)
    monkeypatch.setattr(executorch, "ExecutorchModel", Run)
    monkeypatch.setattr(node, "speed", lambda folder: SPEED)
    monkeypatch.setattr(wasm, "compiler", lambda: "clang")


@pytest.mark.parametrize("kind", EXPORTS)
def test_a_full_disk_at_any_file_leaves_what_was_there(tmp_path: Path, quick: None, kind: str) -> None:
    model, folder = model_of(CONFIG), tmp_path / "out"
    EXPORTS[kind](model, folder)
    before = entries(tmp_path)
    sizes = sorted({len(content) for content in before.values()})
    for room in (0, *(size - 1 for size in sizes), *(size // 2 for size in sizes)):
        with full_disk(after=room), pytest.raises(OSError) as caught:
            EXPORTS[kind](model, folder)
        assert str(caught.value).startswith(f"{folder} cannot be written: ")
        assert "\n" not in str(caught.value)
        assert entries(tmp_path) == before
    with full_disk(after=sizes[-1] + 1000):
        EXPORTS[kind](model, folder)


@pytest.mark.parametrize("compiled", [torch.compile, lowering.compile])
@pytest.mark.parametrize("kind", EXPORTS)
def test_a_compiled_model_in_another_type_is_exported_as_what_it_is(
    tmp_path: Path, quick: None, kind: str, compiled: Callable[[Any], Any]
) -> None:
    config = CONFIG.model_copy(update={"tie_embeddings": True, "conv_layers": 1})
    model = model_of(config).to(torch.bfloat16)
    EXPORTS[kind](compiled(model), tmp_path / "out")
    assert Manifest.load(tmp_path / "out").config == config
    if kind in ("c", "wasm"):
        stored = load_file(tmp_path / "out" / "weights.safetensors")
        for name, weight in model.named_parameters():
            assert torch.equal(stored[name], weight.float())


@pytest.mark.parametrize("kind", ["c", "executorch with kernels", "wasm"])
def test_without_a_compiler_nothing_is_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kind: str) -> None:
    monkeypatch.setenv("PATH", "")
    for name in ("CC", "CXX"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(Samples, "of", lambda model: pytest.fail("it is found out too late"))
    with pytest.raises(RuntimeError, match=r"^(there is no C compiler; install|clang is not installed)") as caught:
        EXPORTS[kind](model_of(CONFIG), tmp_path / "out")
    assert "\n" not in str(caught.value)
    assert list(tmp_path.iterdir()) == []


def test_a_compiler_that_is_named_is_taken_or_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CC", "no-such-cache gcc")
    message = r"^CC is 'no-such-cache gcc', and no-such-cache is not the name or the path of a program$"
    with pytest.raises(RuntimeError, match=message):
        EXPORTS["c"](model_of(CONFIG), tmp_path / "out")
    assert list(tmp_path.iterdir()) == []
    monkeypatch.setenv("CC", f"'{sys.executable}' -c pass")
    assert build.compiler() == [sys.executable, "-c", "pass"]
