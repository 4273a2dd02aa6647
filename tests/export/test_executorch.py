"""An ExecuTorch export gives the logits of PyTorch, token by token, from Python and from C++."""

from __future__ import annotations

import copy
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

import lowering
from export import check
from export.c.session import CModel
from export.description import digests
from export.executorch import build, program
from export.executorch.session import ExecutorchModel
from export.manifest import Manifest
from ramnet import RamNetConfig, RamNetForCausalLM, RamState
from tests.export.conftest import checked_card
from tests.export.test_build import entries
from tests.lowering.aot.c_library import model_of

pytest.importorskip("executorch", reason="the export needs executorch: pip install 'ramnet[executorch]'")

# CAPE on one of two heads, then another layer, a convolution, tied embeddings, and a decay that is not 1 − w.
STANDARD = RamNetConfig(
    vocab_size=256, hidden_size=20, num_layers=2, num_heads=[2, 3], value_dim=[5, 4], order=[3, 1], sub_dim=[3, 16],
    top_k=[4, 5], decay_power=0.5, cape_half_layers=1, conv_layers=1, tie_embeddings=True,
)  # fmt: skip
# Neither CAPE nor a convolution, and an FFN.
KERNELS = RamNetConfig(
    vocab_size=256, hidden_size=16, num_layers=2, num_heads=[2, 3], value_dim=4, order=2, sub_dim=[4, 3], top_k=3,
    intermediate_size=24,
)  # fmt: skip


def standard_model() -> RamNetForCausalLM:
    """Return a model in bfloat16."""
    return model_of(STANDARD).to(torch.bfloat16)


Export = Callable[[bool], tuple[RamNetForCausalLM, Path]]


@pytest.fixture(scope="module")
def export_once(tmp_path_factory: pytest.TempPathFactory) -> Export:
    """Exports a model without or with kernels, once; returns it in float32 and its folder."""
    done: dict[bool, tuple[RamNetForCausalLM, Path]] = {}

    def export(kernels: bool) -> tuple[RamNetForCausalLM, Path]:
        if kernels:
            pytest.importorskip("tvm", reason="the CPU kernels need tvm: pip install 'ramnet[tvm]'")
        if kernels not in done:
            model = model_of(KERNELS) if kernels else lowering.compile(standard_model())
            folder = tmp_path_factory.mktemp("parent") / "executorch"
            build.export_executorch(model, folder, kernels=kernels)
            assert all(p.dtype == (torch.float32 if kernels else torch.bfloat16) for p in model.parameters())
            done[kernels] = lowering.plain(model).float(), folder
        return done[kernels]

    return export


@pytest.fixture(params=[False, True], ids=["standard", "kernels"])
def exported(request: pytest.FixtureRequest, export_once: Export) -> tuple[RamNetForCausalLM, Path]:
    return export_once(request.param)


def random_ids(model: RamNetForCausalLM, count: int) -> list[int]:
    ids = torch.randint(model.config.vocab_size, (count,), generator=torch.Generator().manual_seed(1))
    return [int(token) for token in ids]


@torch.no_grad()
def pytorch_logits(model: RamNetForCausalLM, ids: list[int], state: RamState | None = None) -> Tensor:
    return model(torch.tensor([ids]), state).logits[0]


def assert_close(found: list[Tensor], expected: Tensor) -> None:
    assert float((torch.stack(found) - expected).norm() / expected.norm()) < 1e-5


def test_tokens_are_those_of_pytorch_from_the_first_and_after_a_reset(
    exported: tuple[RamNetForCausalLM, Path],
) -> None:
    model, folder = exported
    program = ExecutorchModel(folder)
    assert program.config == model.config
    ids = random_ids(model, 24)
    before = RamState.zeros(model.config, 1).tensors()
    for _ in range(2):
        assert all(torch.equal(tensor, before[name]) for name, tensor in program.state.tensors().items())
        assert_close([program.token(token) for token in ids], pytorch_logits(model, ids))
        assert int(program.state.position) == 24
        program.reset()


def test_the_runtime_of_executorch_runs_the_program(export_once: Export) -> None:
    from executorch.runtime import Runtime

    model, folder = export_once(False)
    program = Runtime.get().load_program(folder / "model.pte")
    assert program.method_names == {"forward", "reset", "config"}
    forward, ids = program.load_method("forward"), random_ids(model, 8)
    found = [forward.execute([torch.tensor([[token]])])[0].flatten() for token in ids]
    assert_close(found, pytorch_logits(model, ids))


@torch.no_grad()
def test_a_state_travels_between_pytorch_and_the_program(
    exported: tuple[RamNetForCausalLM, Path], tmp_path: Path
) -> None:
    model, folder = exported
    ids = random_ids(model, 16)
    model(torch.tensor([ids[:8]])).state.save(tmp_path / "state")
    program = ExecutorchModel(folder)
    program.state = RamState.load(tmp_path / "state")
    assert_close([program.token(token) for token in ids[8:12]], pytorch_logits(model, ids[:12])[8:])
    program.state.save(tmp_path / "state")
    state = RamState.load(tmp_path / "state")
    assert_close(list(pytorch_logits(model, ids[12:], state)), pytorch_logits(model, ids)[12:])

    kept = program.state
    with pytest.raises(ValueError, match=r"state\.memory\[0\] has shape \[2, "):
        program.state = RamState.zeros(model.config, 2)
    assert torch.equal(kept.memory[0], program.state.memory[0])


def test_an_id_outside_the_vocabulary_is_refused_and_changes_nothing(
    exported: tuple[RamNetForCausalLM, Path],
) -> None:
    model, folder = exported
    program = ExecutorchModel(folder)
    for token in (-1, model.config.vocab_size):
        with pytest.raises(ValueError, match=f"the id is {token}; it must be in 0..{model.config.vocab_size - 1}"):
            program.token(token)
        with pytest.raises(RuntimeError):  # the program itself, which C++ calls
            program._token([torch.tensor([[token]])])
    assert int(program.state.position) == 0


def test_rows_of_the_memory_are_written_in_place(export_once: Export) -> None:
    program = (export_once(False)[1] / "model.pte").read_bytes()
    assert b"aten::index_put_\0" in program
    assert b"aten::index_put\0" not in program, "it copies the memory at every token"


def test_the_program_in_cpp_writes_what_pytorch_generates(export_once: Export, tmp_path: Path) -> None:
    from export.executorch import kernels

    source, wheel = export_once(False)[1] / "generate.cpp", kernels.wheel()
    assert len(source.read_text().splitlines()) < 100
    program = tmp_path / "generate"
    parts = ("executorch", "executorch_kernels_optimized", "executorch_backend_xnnpack", "executorch_threadpool")
    command = [
        *kernels.compiler(), *kernels.FLAGS, "-O0", "-Wall", "-Wextra", "-Werror",
        *(option.replace("-I", "-isystem", 1) for option in wheel.includes), source, "-o", program,
        f"-L{wheel.libraries}", f"-Wl,-rpath,{wheel.libraries}", "-Wl,--no-as-needed", *(f"-l{each}" for each in parts),
    ]  # fmt: skip
    subprocess.run(command, check=True)
    prompt = b"A text, "
    for with_kernels in (False, True):
        model, folder = export_once(with_kernels)
        want = model.generate(torch.tensor([list(prompt)]), 12, temperature=0)[0]
        library = [folder / "libramnet_executorch.so"] if with_kernels else []
        done = subprocess.run(
            [program, folder / "model.pte", prompt, "12", *library], stdout=subprocess.PIPE, check=True
        )
        assert done.stdout == prompt + bytes(want.tolist()).removeprefix(prompt) + b"\n"


def test_the_description_is_complete_and_the_check_repeatable(exported: tuple[RamNetForCausalLM, Path]) -> None:
    model, folder = exported
    manifest = Manifest.load(folder)
    assert sorted(entries(folder)) == sorted([*manifest.files, "ramnet.json"])
    assert (manifest.format, manifest.config, manifest.precision) == ("ramnet-executorch-1", model.config, "float32")
    assert (manifest.target == "any") == ("libramnet_executorch.so" not in manifest.files)
    assert manifest.speed is not None and manifest.speed.token_seconds > 0
    assert check.check(folder).error < 1e-5


def test_the_cards_code_runs(
    exported: tuple[RamNetForCausalLM, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    code = checked_card(exported[1])
    monkeypatch.chdir(exported[1])
    scope: dict[str, Any] = {}
    exec(code["python"].replace('"state"', repr(str(tmp_path / "state"))), scope)
    assert scope["logits"].shape == (256,)
    assert ("dlopen" in code["cpp"]) == (exported[1] / "libramnet_executorch.so").exists()


def test_a_program_that_differs_is_not_written(
    export_once: Export, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, folder = export_once(False)
    other = copy.deepcopy(model)
    with torch.no_grad():
        other.head.weight[3] += 0.01
    data = (folder / "model.pte").read_bytes()
    monkeypatch.setattr(program, "write", lambda token, path: path.write_bytes(data))
    with pytest.raises(ValueError, match=r"the logits of .* are off by"):
        build.export_executorch(other, tmp_path / "parent" / "out")
    assert list(tmp_path.iterdir()) == []


def test_a_damaged_program_is_named(export_once: Export, tmp_path: Path) -> None:
    folder = export_once(False)[1]
    (tmp_path / "model.pte").write_bytes((folder / "model.pte").read_bytes()[:4000])
    Manifest.load(folder).model_copy(update={"files": digests(tmp_path)}).save(tmp_path)
    with pytest.raises(ValueError, match=r"model\.pte cannot be loaded by ExecuTorch: "):
        ExecutorchModel(tmp_path)


def test_kernels_read_weights_as_they_are_stored(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The kernel gives what the C library of the same weights gives. Int4 has matrices of 4 and 8 bits and scales of 16
    and 32."""
    from export.c.build import write_weights
    from export.executorch import kernels
    from lowering.aot.build import shared_library

    pytest.importorskip("tvm", reason="the CPU kernels need tvm: pip install 'ramnet[tvm]'")
    precision = "int4"
    monkeypatch.setattr(kernels, "FLAGS", (*kernels.FLAGS, "-O0"))  # which compiles faster
    small = {
        "num_layers": 1,
        "num_heads": 2,
        "value_dim": 16,
        "sub_dim": 4,
    }  # rounding chooses other slots in more layers
    model = model_of(KERNELS.model_copy(update={"hidden_size": 32, "intermediate_size": 32, **small}))
    made = build.export_executorch(model, tmp_path / "out", kernels=True, precision=precision)
    assert (made.precision, made.error is not None and made.error < 0.1) == (precision, True)
    write_weights(model, precision, tmp_path)
    library = CModel(shared_library(model.config, precision), tmp_path / "weights.safetensors")
    state, found = library.state(), ExecutorchModel(tmp_path / "out")
    for token in (3, 200, 7):
        np.testing.assert_array_equal(found.token(token).numpy(), library.token(state, token))


def test_without_kernels_the_precision_is_float32(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="precision is 'int8'; without kernels, ExecuTorch's program is float32"):
        build.export_executorch(standard_model(), tmp_path / "out", precision="int8")


def test_kernels_refuse_a_changed_model(tmp_path: Path) -> None:
    pytest.importorskip("tvm", reason="the CPU kernels need tvm: pip install 'ramnet[tvm]'")
    model = model_of(KERNELS)
    model.head = nn.Sequential(model.head, nn.Tanh())
    with pytest.raises(ValueError, match="the model was changed after it was built"):
        build.export_executorch(model, tmp_path / "out", kernels=True)
    assert list(tmp_path.iterdir()) == []
