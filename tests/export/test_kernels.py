"""An export with kernels runs each layer's memory in a library of custom operators, and checks it before loading it."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import torch

import export
from export.onnx import apart, ports
from export.onnx.build import export_onnx
from export.onnx.session import OnnxSession, run_copying
from export.onnx.sidecar import DIGESTED, LIBRARY, ORT_FILES, Sidecar
from export.onnx.state import OnnxState
from lowering.aot import build
from ramnet import RamNetForCausalLM
from ramnet.files import sha256
from tests.export.conftest import Exported, assert_verified_without_torch, make_model

pytest.importorskip("onnxruntime", reason="the export needs onnxruntime: pip install 'ramnet[export]'")
pytest.importorskip("tvm", reason="the CPU kernels need tvm: pip install 'ramnet[tvm]'")

TOLERANCE = 2e-5  # float32 sums in another order
SMALL: dict[str, Any] = {"vocab_size": 256, "hidden_size": 21, "intermediate_size": 0, "conv_layers": 0}


@pytest.fixture(scope="module")
def model() -> RamNetForCausalLM:
    """Two layers of odd sizes, with CAPE on one head of three and on none."""
    return make_model("mixed", **SMALL)


@pytest.fixture(scope="module")
def exported(model: RamNetForCausalLM, tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("kernels") / "onnx"
    export_onnx(model, directory, kernels=True, ort=True)
    return directory


@pytest.fixture(scope="module")
def session(exported: Path) -> OnnxSession:
    return OnnxSession(exported, threads=2)


def test_a_layer_is_one_node_and_the_library_lies_beside_it(exported: Path, model: RamNetForCausalLM) -> None:
    for kind in ports.GRAPHS:
        nodes = onnx.load(exported / f"{kind}.onnx", load_external_data=False).graph.node
        assert [node.op_type for node in nodes if node.domain] == ["memory"] * model.config.num_layers
        assert {node.domain for node in nodes} == {"", "ramnet"}
    sidecar = Sidecar.load(exported)
    assert sidecar.kernels == "cpu"
    assert sorted(sidecar.files) == sorted((*DIGESTED, LIBRARY, *ORT_FILES))
    assert LIBRARY in (exported / "README.md").read_text()


@pytest.mark.parametrize(("batch", "tokens"), [(1, 1), (2, 7), (3, 300)])
@torch.no_grad()
def test_prefill_then_decode_equals_pytorch(
    model: RamNetForCausalLM, session: OnnxSession, batch: int, tokens: int
) -> None:
    """300 tokens of 3 rows are more than one task for the address kernel and for threads."""
    ids = torch.randint(256, (batch, tokens + 5), generator=torch.Generator().manual_seed(tokens))
    start = model(ids).state  # positions and memories that are not the first
    start.position.copy_(2**31 - 7 + 5 * torch.arange(batch))
    expected = model(ids, start)
    found = session.prefill(ids[:, :tokens], OnnxState.of(start))
    logits = [found.logits, *(session.step(ids[:, t : t + 1], found.state) for t in range(tokens, tokens + 5))]
    assert float((torch.cat(logits, 1) - expected.logits).abs().max()) < TOLERANCE
    for name, tensor in expected.state.tensors().items():
        np.testing.assert_allclose(found.state.tensors[name], tensor.numpy(), atol=TOLERANCE)


def test_a_bound_step_equals_a_copying_one(session: OnnxSession) -> None:
    bound = session.prefill(torch.arange(80).view(40, 2)).state  # more rows than a task has
    copied = bound.clone()
    for token in range(5):
        ids = (torch.arange(40).view(40, 1) + token) % 256
        logits = session.step(ids, bound)
        output, _ = run_copying(session.graphs["decode"], ids, copied)
        copied = output.state
        assert torch.equal(logits, output.logits)
    for name, array in bound.tensors.items():
        np.testing.assert_array_equal(array, copied.tensors[name])


def test_the_example_writes_what_pytorch_generates(exported: Path, model: RamNetForCausalLM) -> None:
    program = Path(export.__file__).parent / "examples" / "onnxruntime" / "generate.py"
    done = subprocess.run([sys.executable, program, exported, "A text", "12"], capture_output=True, check=True)
    ids = torch.tensor([list(b"A text")])
    assert done.stdout == b"A text" + bytes(model.generate(ids, 12, temperature=0)[0].tolist())[-12:]


def test_the_program_in_c_writes_what_pytorch_generates(
    exported: Path, model: RamNetForCausalLM, export_named: Callable[[str], Exported], tmp_path: Path
) -> None:
    """It is linked with the library of the onnxruntime package, without its headers."""
    import onnxruntime

    (found,) = (Path(onnxruntime.__file__).parent / "capi").glob("libonnxruntime.so.*")
    library = tmp_path / "libonnxruntime.so.1"
    library.symlink_to(found)
    folder = Path(export.__file__).parent
    flags = ["-std=gnu11", "-Wall", "-Wextra", "-Werror", f"-I{folder / 'onnx'}", "-Wl,-rpath,$ORIGIN"]
    program = tmp_path / "generate"
    command = [*build.compiler(), *flags, folder / "examples" / "onnxruntime" / "generate.c", library, "-o", program]
    subprocess.run(command, check=True)
    standard, ids = export_named("mixed"), torch.tensor([list(b"A text")])
    for directory, reference in ((exported, model), (standard.onnx, standard.model)):
        done = subprocess.run([program, directory, "A text", "12"], capture_output=True, check=True)
        assert done.stdout == bytes(reference.generate(ids, 12, temperature=0)[0].tolist()) + b"\n"
    running = []
    for threads in (1, 3):
        command = [program, exported, "A text", "1000000", str(threads)]
        with subprocess.Popen(command, stdout=subprocess.PIPE) as process:
            assert process.stdout is not None
            process.stdout.read(len("A text") + 1)
            running.append(len(list(Path(f"/proc/{process.pid}/task").iterdir())))
            process.kill()
    assert running[1] - running[0] == 2
    done = subprocess.run([program, tmp_path, "A text", "12"], capture_output=True, text=True)
    assert (done.returncode, done.stderr.count("\n")) == (1, 1)
    assert f"{tmp_path}/decode.onnx" in done.stderr


def test_verify_needs_no_torch(exported: Path) -> None:
    assert_verified_without_torch(exported)


def test_an_altered_library_is_refused_before_its_code_runs(exported: Path, tmp_path: Path) -> None:
    """The library that takes its place would end the process."""
    shutil.copytree(exported, tmp_path / "onnx")
    library = tmp_path / "onnx" / LIBRARY
    (tmp_path / "end.c").write_text(
        "#include <stdlib.h>\n__attribute__((constructor)) static void end(void) { _Exit(3); }"
    )
    subprocess.run([*build.compiler(), "-shared", "-fPIC", "-o", library, tmp_path / "end.c"], check=True)
    with pytest.raises(ValueError, match=re.escape(f"{library} is damaged: it differs from what was exported")):
        OnnxSession(tmp_path / "onnx")
    library.unlink()
    with pytest.raises(ValueError, match=f"{LIBRARY} is missing"):
        OnnxSession(tmp_path / "onnx")


@pytest.mark.parametrize(
    ("name", "value", "problem"),
    [
        ("decay_power", 2.0, r"a node has decay_power 2; this library is built for 0\.5"),
        ("top_k", 5, "a node has num_heads 3, .* and top_k 5; this library is built for other layers"),
    ],
)
def test_a_library_of_another_model_is_refused_in_one_sentence(
    name: str, value: float, problem: str, exported: Path, tmp_path: Path
) -> None:
    shutil.copytree(exported, tmp_path / "onnx")
    path = tmp_path / "onnx" / "decode.onnx"
    model = onnx.load(path, load_external_data=False)
    for node in model.graph.node:
        for attribute in node.attribute:
            if attribute.name == name:
                setattr(attribute, "f" if isinstance(value, float) else "i", value)
    path.write_bytes(model.SerializeToString())
    sidecar = Sidecar.load(exported)
    sidecar.model_copy(update={"files": {**sidecar.files, path.name: sha256(path)}}).save(path.parent)
    with pytest.raises(ValueError, match=rf"decode\.onnx cannot be loaded by onnxruntime: .*{problem}"):
        OnnxSession(path.parent)


def test_a_kernel_that_crashes_ends_the_process_that_checks_alone(
    exported: Path, model: RamNetForCausalLM, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(apart, "_COMMAND", ("-c", "import os, signal; os.kill(os.getpid(), signal.SIGSEGV)"))
    with pytest.raises(RuntimeError, match="the process that checks the export ended with -11"):
        list(apart.compare(model, exported))


def test_the_check_imports_nothing_of_the_folder_that_it_is_called_in(
    exported: Path, model: RamNetForCausalLM, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    (tmp_path / "export.py").write_text("raise SystemExit(3)")
    monkeypatch.chdir(tmp_path)
    assert list(apart.compare(model, exported))


def test_a_target_that_cannot_be_built_here_is_named(model: RamNetForCausalLM, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="target is 'i386'; a library can be built here for cpu"):
        export_onnx(model, tmp_path / "onnx", kernels=True, target="i386")
    assert list(tmp_path.iterdir()) == []


def test_there_must_be_a_compiler(model: RamNetForCausalLM, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", "")
    monkeypatch.delenv("CC", raising=False)
    with pytest.raises(RuntimeError, match="there is no C compiler; install gcc or clang"):
        export_onnx(model, tmp_path / "onnx", kernels=True)


def header() -> Path | None:
    """ONNX Runtime's own header: in ``$ONNXRUNTIME_INCLUDE``, or where Debian's libonnxruntime-dev has it."""
    folders = (os.environ.get("ONNXRUNTIME_INCLUDE"), "/usr/include/onnxruntime", "/usr/local/include/onnxruntime")
    found = (Path(folder) / "onnxruntime_c_api.h" for folder in folders if folder)
    return next((path for path in found if path.is_file()), None)


def test_the_declared_interface_is_onnxruntimes(tmp_path: Path) -> None:
    """Each member that ``ort.h`` declares is where ONNX Runtime's header has it."""
    real = header()
    if real is None:
        pytest.skip("needs onnxruntime_c_api.h; name its folder in ONNXRUNTIME_INCLUDE")
    ours = Path(export.__file__).parent / "onnx" / "ort.h"
    text = ours.read_text()
    renamed = re.sub(r"\bOrt(\w+)|\bORT_(\w+)", lambda found: f"Ours{found.group(0)}", text)
    api, ops = text.split("} OrtApi;")
    member = re.compile(r"^  [\w* ]+?(?:\(\*|unused\* )(\w+)", re.MULTILINE)
    members = {"OrtApi": member.findall(api), "OrtCustomOp": member.findall(ops)}
    lines = ["#include <stddef.h>", f'#include "{real}"', renamed]
    for table, names in members.items():
        assert len(names) > 12
        later = {"InferOutputShape": "InferOutputShapeFn"}
        lines += [
            f'_Static_assert(offsetof({table}, {later.get(name, name)}) == offsetof(Ours{table}, {name}), "{name}");'
            for name in names
            if name not in ("GetApi", "GetVersionString")
        ]
    (tmp_path / "check.c").write_text("\n".join(lines))
    subprocess.run([*build.compiler(), "-std=c11", "-fsyntax-only", tmp_path / "check.c"], check=True)
