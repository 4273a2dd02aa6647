"""``ramnet export --format c`` writes a library that runs where PyTorch is not installed, or it writes nothing."""

from __future__ import annotations

import _ctypes
import json
import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from click.testing import CliRunner
from torch import nn

from export import check, process
from export.c.build import ARCHIVE, HEADER, PROGRAM, export_c
from export.c.session import LIBRARY, WEIGHTS, CModel, CState
from export.cli import export, verify
from export.manifest import Manifest
from export.samples import Samples
from lowering.aot import build
from ramnet import RamNetForCausalLM
from ramnet.files import sha256
from schedules.deployment import Deployment
from tests.export.conftest import assert_verified_without_torch, checked_card
from tests.export.test_build import entries
from tests.lowering.aot.c_library import TINY, model_of

pytest.importorskip("tvm", reason="the CPU kernels need tvm: pip install 'ramnet[tvm]'")


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("checkpoint")
    model_of(TINY).save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def bundle(checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The export of ``checkpoint`` in int8."""
    folder = tmp_path_factory.mktemp("parent") / "c"
    command = [str(checkpoint), "--output", str(folder), "--format", "c", "--precision", "int8"]
    done = CliRunner().invoke(export, command, catch_exceptions=False)
    assert done.exit_code == 0
    assert "verified: the logits are off by" in done.output
    assert f"bits per byte are not measured: {checkpoint} holds no training" in done.output
    return folder


def test_a_bundle_is_complete(bundle: Path) -> None:
    manifest = Manifest.load(bundle)
    assert {LIBRARY, ARCHIVE, HEADER, WEIGHTS, PROGRAM, "LICENSE", "samples.safetensors"} <= set(manifest.files)
    assert sorted(entries(bundle)) == sorted([*manifest.files, "ramnet.json"])
    assert (manifest.precision, manifest.text, manifest.config) == ("int8", "bytes", TINY)
    assert manifest.error is not None and 0 < manifest.error < 0.1
    assert manifest.speed is not None and manifest.speed.token_seconds > 0
    assert all((bundle / name).stat().st_mode & 0o444 == 0o444 for name in manifest.files), "anyone may read the files"


def test_verify_needs_no_torch(bundle: Path) -> None:
    assert_verified_without_torch(bundle)


def test_the_samples_are_pytorchs_logits_with_the_weights_as_stored(checkpoint: Path, bundle: Path) -> None:
    from safetensors.torch import load_file

    stored = load_file(bundle / WEIGHTS)
    parameters = {
        name: x.float() * stored[name.replace(".weight", ".scale")][:, None] if x.dtype == torch.int8 else x
        for name, x in stored.items()
        if not name.endswith(".scale")
    }
    model = RamNetForCausalLM.from_pretrained(checkpoint)
    model.load_state_dict(parameters)
    samples = Samples.load(bundle)
    with torch.no_grad():
        want = model(torch.from_numpy(samples.ids.astype(np.int64))[None]).logits[0]
    torch.testing.assert_close(torch.from_numpy(samples.logits), want)


def test_the_bundles_program_links_with_either_library(bundle: Path, tmp_path: Path) -> None:
    texts = []
    for library in ([str(bundle / ARCHIVE), "-lm", "-pthread"], [str(bundle / LIBRARY), f"-Wl,-rpath,{bundle}"]):
        program = tmp_path / "generate"
        flags = "-Wall", "-Werror", f"-I{bundle}"
        subprocess.run([*build.compiler(), *flags, bundle / PROGRAM, "-o", program, *library], check=True)
        done = subprocess.run([program, bundle / WEIGHTS, "def f", "20"], capture_output=True, check=True)
        texts.append(done.stdout)
    assert texts[0] == texts[1] and len(texts[0]) == len("def f") + 20 + 1


def test_the_cards_code_runs(bundle: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    code = checked_card(bundle)
    (tmp_path / "program.c").write_text(code["c"])
    flags = ["-Wall", "-Wextra", "-Werror", f"-I{bundle}", "-o", "program"]
    libraries = [bundle / ARCHIVE, "-lm", "-pthread"]
    subprocess.run([*build.compiler(), *flags, "program.c", *libraries], cwd=tmp_path, check=True)
    subprocess.run([tmp_path / "program"], cwd=bundle, check=True)
    for name in (LIBRARY, WEIGHTS):
        (tmp_path / name).symlink_to(bundle / name)
    monkeypatch.chdir(tmp_path)
    scope: dict[str, Any] = {}
    exec(code["python"], scope)
    assert scope["logits"].shape == (256,)


@pytest.mark.parametrize("name", [LIBRARY, ARCHIVE, HEADER, WEIGHTS, PROGRAM, "samples.safetensors", "LICENSE"])
def test_an_altered_or_missing_file_is_named(bundle: Path, tmp_path: Path, name: str) -> None:
    copy = tmp_path / "copy"
    copy.mkdir()
    for path in bundle.iterdir():
        (copy / path.name).symlink_to(path)
    data = bytearray((bundle / name).read_bytes())
    data[len(data) // 2] ^= 1
    (copy / name).unlink()
    with pytest.raises(ValueError, match=f"is incomplete: {name} is missing"):
        check.check(copy)
    (copy / name).write_bytes(data)
    for load in (check.check, lambda folder: CModel(folder / LIBRARY, folder / WEIGHTS)):
        with pytest.raises(ValueError, match=f"{name} is damaged: it differs from what was exported"):
            load(copy)
    if name == WEIGHTS:  # the C library knows by itself
        with pytest.raises(ValueError, match=f"{name} is damaged: its data was altered"):
            CModel(bundle / LIBRARY, copy / WEIGHTS)


@pytest.mark.parametrize("name", ["../weights.safetensors", "/etc/passwd", "..", ""])
def test_a_description_cannot_name_files_elsewhere(bundle: Path, tmp_path: Path, name: str) -> None:
    description = json.loads((bundle / "ramnet.json").read_text())
    (tmp_path / "ramnet.json").write_text(json.dumps({**description, "files": {name: "0"}}))
    with pytest.raises(ValueError, match="it must name files of the folder"):
        check.check(tmp_path)


def test_the_card_of_a_tuned_export_says_how_it_was_tuned(
    bundle: Path, checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def copied(config: object, precision: str, machine: object, directory: Path, loops: object) -> None:
        for name in (LIBRARY, ARCHIVE, HEADER):
            (directory / name).write_bytes((bundle / name).read_bytes())

    monkeypatch.setattr(build, "write_libraries", copied)
    tuned = Deployment(precision="int8", rows=2, lanes=16, tokens=4, threads=2, spins=2000, block=64)
    export_c(RamNetForCausalLM.from_pretrained(checkpoint), tmp_path / "c", deployment=tuned)
    card = (tmp_path / "c" / "README.md").read_text()
    assert "int8, 2 rows of 16 lanes, 4 of 64 tokens, 2 threads, 2000 spins." in card
    assert '"weights.safetensors", 2, &model' in card and "threads=2)" in card and " µs, 2 threads, on" in card
    assert "tune-model" not in (bundle / "README.md").read_text()


def test_an_export_that_differs_from_pytorch_is_not_written(
    bundle: Path, checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def copied(config: object, precision: str, machine: object, directory: Path, loops: object) -> None:
        for name in (LIBRARY, ARCHIVE, HEADER):
            (directory / name).write_bytes((bundle / name).read_bytes())

    def negated(samples: Samples, directory: Path) -> None:
        save(Samples(samples.ids, -samples.logits), directory)

    save = Samples.save
    monkeypatch.setattr(build, "write_libraries", copied)
    model = RamNetForCausalLM.from_pretrained(checkpoint)
    export_c(model, tmp_path / "c", precision="int8")
    before = entries(tmp_path)
    monkeypatch.setattr(Samples, "save", negated)
    with pytest.raises(ValueError, match=r"are off by 2.0e\+00; the tolerance is 5e-01"):
        export_c(model, tmp_path / "c", precision="int8")
    assert entries(tmp_path) == before
    monkeypatch.setattr(build, "write_libraries", lambda *_: (_ for _ in ()).throw(OSError(28, "No space left")))
    with pytest.raises(OSError, match="c cannot be written: No space left"):
        export_c(model, tmp_path / "c", precision="int8")
    assert entries(tmp_path) == before


def test_a_crash_of_the_library_is_a_sentence(bundle: Path, tmp_path: Path) -> None:
    (tmp_path / "abort.c").write_text(
        "#include <stdlib.h>\nvoid ramnet_message(void) {}\n"
        "void ramnet_state_position(void) {}\nint ramnet_vocabulary(void) { abort(); }\n"
    )
    copy = tmp_path / "copy"
    copy.mkdir()
    subprocess.run([*build.compiler(), "-shared", "-fPIC", tmp_path / "abort.c", "-o", copy / LIBRARY], check=True)
    for path in bundle.iterdir():
        if path.name not in (LIBRARY, "ramnet.json"):
            (copy / path.name).symlink_to(path)
    from export.description import digests

    manifest = Manifest.load(bundle)
    manifest.model_copy(update={"files": digests(copy)}).save(copy)
    with pytest.raises(ValueError, match="crashed when it was verified, by signal 6"):
        process.check(copy)


@pytest.mark.parametrize("change", ["adapter", "hook", "precision", "target"])
def test_what_a_library_cannot_hold_is_refused(checkpoint: Path, tmp_path: Path, change: str) -> None:
    model = RamNetForCausalLM.from_pretrained(checkpoint)
    options = {"precision": "int8"}
    message = "the model was changed after it was built"
    if change == "adapter":
        model.head = nn.Sequential(model.head, nn.Identity())
    elif change == "hook":
        model.head.register_forward_hook(lambda module, inputs, output: output + 1)
    else:
        options[change] = "fp3"
        message = f"{change} is 'fp3'; it must be"
    with pytest.raises(ValueError, match=message):
        export_c(model, tmp_path / "c", **options)
    assert entries(tmp_path) == {}


def test_state_files_travel_between_python_and_the_bundle(checkpoint: Path, bundle: Path, tmp_path: Path) -> None:
    from ramnet import RamState

    model = CModel(bundle / LIBRARY, bundle / WEIGHTS)
    state = model.state()
    logits = model.tokens(state, [1, 2, 3])
    state.save(tmp_path / "state")
    assert RamState.load(tmp_path / "state").position.tolist() == [3]
    clone = state.clone()
    state.reset()
    assert (state.position, clone.position) == (0, 3)
    np.testing.assert_array_equal(model.tokens(state, np.array([1, 2, 3]), last=np.int64(1)), logits)
    odd = tmp_path / os.fsdecode(b"\xff")  # no text in UTF-8
    clone.save(odd)
    model.state().load(odd)
    with pytest.raises(ValueError, match="id 0 is 256; it must be in"):
        model.token(clone, 256)
    np.testing.assert_array_equal(model.step([state, clone], [4, 5])[0], model.token(_after(model, [1, 2, 3]), 4))


@pytest.mark.parametrize(
    ("call", "kind", "message"),
    [
        (lambda m, s: m.token(s, 2**32 + 5), ValueError, r"id 0 is 4294967301; it must be in 0\.\.255"),
        (lambda m, s: m.tokens(s, np.array([1, -1])), ValueError, r"id 1 is -1; it must be in 0\.\.255"),
        (lambda m, s: m.tokens(s, [5.9]), TypeError, "ids is float64; it must be integers"),
        (lambda m, s: m.tokens(s, ["5"]), TypeError, "ids is <U1; it must be integers"),
        (lambda m, s: m.tokens(s, [[5], [6]]), ValueError, r"ids has shape \[2, 1\]; it must be \[T\]"),
        (lambda m, s: m.tokens(s, [5], 1.0), TypeError, "'float' object cannot be interpreted as an integer"),
        (lambda m, s: m.tokens(s, [5], 2), ValueError, r"last is 2; it must be in 0\.\.1, the number of ids"),
        (lambda m, s: m.step([s, s.clone()], [5]), ValueError, "there are 1 ids and 2 states; each state reads one id"),
        (lambda m, s: m.token(None, 5), ValueError, "the state is of another model"),
    ],
)
def test_arguments_are_checked_before_the_library_converts_them(
    bundle: Path, call: Callable[[CModel, CState], object], kind: type[Exception], message: str
) -> None:
    model = CModel(bundle / LIBRARY, bundle / WEIGHTS)
    state = model.state()
    with pytest.raises(kind, match=f"^{message}"):
        call(model, state)
    assert state.position == 0
    with pytest.raises(ValueError, match="the state is of another model"):
        CModel(bundle / LIBRARY, bundle / WEIGHTS).token(state, 5)


@pytest.mark.parametrize("threads", [0, 2**32 + 1, 1.5])
def test_threads_that_the_library_cannot_have_are_refused(bundle: Path, threads: int) -> None:
    with pytest.raises(ValueError, match=rf"^threads is {threads}; it must be in 1\.\.2\^31 - 1$"):
        CModel(bundle / LIBRARY, bundle / WEIGHTS, threads)


def test_an_export_that_replaces_a_loaded_one_is_loaded(tmp_path: Path) -> None:
    """The system knows a library by its path."""
    found, models = [], []
    for layers in (1, 2):
        model = model_of(TINY.model_copy(update={"num_layers": layers, "cape_half_layers": 0}))
        export_c(model, tmp_path / "c")
        models.append(CModel(tmp_path / "c" / LIBRARY, tmp_path / "c" / WEIGHTS))
        found.append(models[-1].tokens(models[-1].state(), [1, 2, 3]))
    np.testing.assert_array_equal(models[0].tokens(models[0].state(), [1, 2, 3]), found[0])
    with pytest.raises(ValueError, match="is not the library of an exported model"):
        CModel(Path(_ctypes.__file__), tmp_path / "c" / WEIGHTS)


def _after(model: CModel, ids: list[int]) -> object:
    state = model.state()
    model.tokens(state, ids)
    return state


def test_a_forked_process_runs_and_closes_its_parents_model(bundle: Path) -> None:
    """It has none of the threads of its parent."""
    model = CModel(bundle / LIBRARY, bundle / WEIGHTS, threads=3)
    state = model.state()
    logits = model.tokens(state.clone(), [1, 2, 3])
    child = os.fork()
    if child == 0:
        signal.alarm(600)  # ends the process if it waits for a thread
        same = np.array_equal(model.tokens(state, [1, 2, 3]), logits)
        del state, model
        os._exit(0 if same else 1)
    assert os.waitpid(child, 0)[1] == 0
    np.testing.assert_array_equal(model.tokens(state, [1, 2, 3]), logits)


def test_verify_prints_one_line(bundle: Path) -> None:
    done = CliRunner().invoke(verify, [str(bundle)], catch_exceptions=False)
    assert done.exit_code == 0 and done.output.count("\n") == 1


def test_a_program_may_load_several_models_whose_functions_have_the_same_names(bundle: Path, tmp_path: Path) -> None:
    """Names of a library that is loaded first would replace those of the second."""
    other = model_of(TINY.model_copy(update={"hidden_size": 20, "order": 2, "intermediate_size": 24}))
    export_c(other, tmp_path / "other")
    script = """
import ctypes, sys
from export.c.session import CModel, CState

first, second, weights = sys.argv[1:]
ctypes.CDLL(first, mode=ctypes.RTLD_GLOBAL)
model = CModel(second, weights)
print(*model.tokens(CState(model), [0, 1, 2]).ravel().tolist())
"""
    paths = bundle / LIBRARY, tmp_path / "other" / LIBRARY, tmp_path / "other" / WEIGHTS
    done = subprocess.run([sys.executable, "-c", script, *map(str, paths)], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    want = other(torch.tensor([[0, 1, 2]])).logits[0, -1]
    torch.testing.assert_close(torch.tensor([*map(float, done.stdout.split())]), want, rtol=1e-4, atol=1e-4)


def test_a_library_for_another_processor_is_named(bundle: Path, tmp_path: Path) -> None:
    folder = tmp_path / "bundle"
    shutil.copytree(bundle, folder)
    content = bytearray((folder / LIBRARY).read_bytes())
    content[18:20] = (243).to_bytes(2, "little")  # the ELF machine: RISC-V
    (folder / LIBRARY).write_bytes(content)
    manifest = json.loads((folder / "ramnet.json").read_text())
    manifest["files"][LIBRARY] = sha256(folder / LIBRARY)
    (folder / "ramnet.json").write_text(json.dumps(manifest))
    with pytest.raises(
        OSError, match=rf"^{folder / LIBRARY} cannot be loaded on this machine, \w+; it may be compiled"
    ):
        CModel(folder / LIBRARY, folder / WEIGHTS)


def test_a_long_path_leaves_the_reason(bundle: Path, tmp_path: Path) -> None:
    state = CState(CModel(bundle / LIBRARY, bundle / WEIGHTS))
    path = tmp_path.joinpath(*["a" * 200] * 4, "state")
    with pytest.raises((ValueError, OSError), match=rf"{path}.* No such file or directory$"):
        state.save(path)
