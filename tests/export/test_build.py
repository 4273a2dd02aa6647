"""What an export writes, and that a failure writes nothing."""

from __future__ import annotations

import copy
import re
import shutil
from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path
from typing import Any

import onnx
import pytest
import torch

from export.onnx import build, describe, graphs, ports, verify
from export.onnx.build import FILES, VerificationError, export_onnx
from export.onnx.session import OnnxSession
from export.onnx.sidecar import Sidecar
from export.samples import Samples
from schedules.of_model import of_model
from schedules.records import choose
from tests.export.conftest import Exported, assert_verified_without_torch, make_model
from tests.samples import full_disk


def entries(directory: Path) -> dict[str, bytes]:
    """All files below a folder, including hidden ones."""
    return {str(p.relative_to(directory)): p.read_bytes() for p in directory.rglob("*") if p.is_file()}


def test_graphs_hold_standard_operators_alone(exported: Exported) -> None:
    for name in ports.GRAPHS:
        model = onnx.load(exported.onnx / f"{name}.onnx", load_external_data=False)
        assert [(domain.domain, domain.version) for domain in model.opset_import] == [("", 18)]
        assert not model.functions
        assert any(node.op_type == "Scan" for node in model.graph.node) == (name == "prefill")


def test_graphs_contain_no_paths_of_the_exporting_machine(exported: Exported) -> None:
    for name in ports.GRAPHS:
        assert str(Path(graphs.__file__).parents[2]).encode() not in (exported.onnx / f"{name}.onnx").read_bytes()


def test_sidecar_describes_the_export(mixed: Exported) -> None:
    sidecar = Sidecar.load(mixed.onnx)
    assert sidecar.config == mixed.model.config
    assert sidecar.opset == 18
    assert sidecar.versions["torch"] == version("torch")
    assert sidecar.schedules == {
        workload.name: {"default": choose(workload, "cpu", device="").schedule.model_dump()}
        for workload in of_model(mixed.model.config)
    }
    assert max(sidecar.largest_errors.values()) < 1e-5
    decode = {port.name: (port.shape, port.dtype) for port in sidecar.graphs["decode"].inputs}
    assert decode["input_ids"] == (["batch", 1], "int64")
    assert decode["past_recurrent.memory.0"] == (["batch", 3, 27, 5], "float32")
    assert decode["past_recurrent.mass.1"] == (["batch", 2, 36], "float32")
    assert decode["past_recurrent.conv.1"] == (["batch", 2, 21], "float32")
    assert decode["past_recurrent.position"] == (["batch"], "int64")
    prefill = {port.name: port.shape for port in sidecar.graphs["prefill"].outputs}
    assert prefill["logits"] == ["batch", "tokens", 256]
    assert prefill["present_recurrent.memory.0"] == ["batch", 3, 27, 5]


def test_an_export_of_the_format_with_one_position_for_all_rows_is_refused(mixed: Exported, tmp_path: Path) -> None:
    shutil.copytree(mixed.onnx, tmp_path / "old")
    path = tmp_path / "old" / "ramnet.json"
    path.write_text(path.read_text().replace("ramnet-onnx-3", "ramnet-onnx-1"))
    with pytest.raises(ValueError, match=re.escape(f"{path} has the format 'ramnet-onnx-1'; it must be ramnet-onnx-3")):
        OnnxSession(tmp_path / "old")


def test_verify_needs_no_torch(mixed: Exported) -> None:
    assert_verified_without_torch(mixed.onnx)


def test_weights_are_stored_once(mixed: Exported) -> None:
    parameters = sum(p.numel() * p.element_size() for p in mixed.model.parameters())
    assert (mixed.onnx / "weights.bin").stat().st_size < 1.5 * parameters


def test_an_earlier_export_is_replaced_atomically(mixed: Exported, tmp_path: Path, quick_build: None) -> None:
    directory = tmp_path / "parent" / "onnx"
    directory.mkdir(parents=True)
    for name, content in entries(mixed.onnx).items():
        (directory / name).write_bytes(content)
    before = entries(tmp_path)
    other = make_model("mixed")
    with torch.no_grad():
        other.blocks[1].mixer.query_key_value.weight[0, 0] += 0.01
    with pytest.raises(VerificationError, match="nothing was written") as caught:
        export_onnx(other, directory)
    assert not all(check.passed for check in caught.value.checks)
    assert entries(tmp_path) == before

    export_onnx(copy.deepcopy(mixed.model).double(), directory)  # of any floating type; the graphs are float32
    assert sorted(entries(tmp_path)) == sorted(f"parent/onnx/{file}" for file in FILES)


@pytest.mark.parametrize("stage", ["decode.onnx built", "graphs checked", "prefill of 1"])
def test_an_interrupt_leaves_nothing(mixed: Exported, tmp_path: Path, quick_build: None, stage: str) -> None:
    def interrupt(ended: str) -> None:
        if ended == stage:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        export_onnx(mixed.model, tmp_path / "parent" / "onnx", on_progress=interrupt)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("full", ["weights.bin", "decode.onnx", "prefill.onnx", "ramnet.json"])
def test_a_full_disk_leaves_what_was_there_and_names_the_export(
    export_named: Callable[[str], Exported], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, full: str
) -> None:
    """For each file of an export, simulate a disk that is full after the files before it."""
    import onnx_ir

    made = export_named("wide")
    monkeypatch.setattr(graphs, "build", lambda model, kind, kernels: onnx_ir.load(made.onnx / f"{kind}.onnx"))
    monkeypatch.setattr(build, "_schedules", lambda config, device: {"cpu": "x" * 20_000})
    sizes = {name: (made.onnx / name).stat().st_size for name in FILES}
    room = {
        "weights.bin": 1000,
        "decode.onnx": sizes["weights.bin"],
        "prefill.onnx": sizes["decode.onnx"],
        "ramnet.json": sizes["prefill.onnx"],
    }[full]
    shutil.copytree(made.onnx, tmp_path / "onnx")
    before = entries(tmp_path)
    problem = re.escape(f"{tmp_path / 'onnx'} cannot be written: ")
    with full_disk(after=room), pytest.raises(OSError, match=problem):
        export_onnx(made.model, tmp_path / "onnx")
    assert entries(tmp_path) == before


@pytest.mark.parametrize("step", [(Samples, "save"), (describe, "save_card")], ids=["samples", "card"])
def test_a_full_disk_at_the_last_files_leaves_what_was_there(
    mixed: Exported, tmp_path: Path, quick_build: None, monkeypatch: pytest.MonkeyPatch, step: tuple[Any, str]
) -> None:
    save = getattr(*step)

    def full(*arguments: Any) -> None:
        with full_disk(after=100):
            save(*arguments)

    monkeypatch.setattr(*step, full)
    monkeypatch.setattr(verify, "compare", lambda model, session: [verify.Check("none", 1, 0.0, 0.0, 0.0, 1.0, 0.0)])
    with pytest.raises(OSError, match=re.escape(f"{tmp_path / 'onnx'} cannot be written: ")):
        export_onnx(mixed.model, tmp_path / "onnx")
    assert list(tmp_path.iterdir()) == []


def test_a_path_that_cannot_be_written_is_named(mixed: Exported) -> None:
    if not Path("/proc/self").is_dir():
        pytest.skip("needs a file system that takes no files, such as Linux's /proc")
    with pytest.raises(OSError, match="/proc/parent/onnx cannot be written: "):
        export_onnx(mixed.model, "/proc/parent/onnx")


def test_other_files_are_never_replaced(mixed: Exported, tmp_path: Path) -> None:
    (tmp_path / "thesis.txt").write_text("mine")
    with pytest.raises(ValueError, match=r"holds thesis\.txt, which is not part of an export"):
        export_onnx(mixed.model, tmp_path)
    with pytest.raises(ValueError, match="is a file; an export needs a directory"):
        export_onnx(mixed.model, tmp_path / "thesis.txt")
    with pytest.raises(NotADirectoryError):
        export_onnx(mixed.model, tmp_path / "thesis.txt" / "onnx")
    assert entries(tmp_path) == {"thesis.txt": b"mine"}


def test_files_that_any_folder_may_have_do_not_make_it_an_export(mixed: Exported, tmp_path: Path) -> None:
    for name in ("README.md", "LICENSE"):
        (tmp_path / name).write_text("mine")
    with pytest.raises(ValueError, match=r"holds LICENSE, which is not part of an export"):
        export_onnx(mixed.model, tmp_path)
    assert (tmp_path / "README.md").read_text() == "mine"


def test_an_export_whose_description_is_lost_is_replaced(mixed: Exported, tmp_path: Path, quick_build: None) -> None:
    export_onnx(mixed.model, tmp_path / "onnx")
    (tmp_path / "onnx" / "ramnet.json").unlink()
    export_onnx(mixed.model, tmp_path / "onnx")
    assert sorted(entries(tmp_path / "onnx")) == sorted(FILES)


def test_a_mount_point_is_refused_before_anything_is_built(mixed: Exported, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(graphs, "build", lambda *_: pytest.fail("it is found out too late"))
    with pytest.raises(
        ValueError, match=r"^/proc is a mount point, which cannot be replaced; name a folder within it$"
    ):
        export_onnx(mixed.model, "/proc")


def test_the_cards_code_runs(exported: Exported, monkeypatch: pytest.MonkeyPatch) -> None:
    code = re.search(r"```python\n(.*?)```", (exported.onnx / "README.md").read_text(), re.DOTALL)
    assert code is not None
    monkeypatch.chdir(exported.onnx)
    names: dict[str, Any] = {}
    exec(code[1], names)
    assert names["logits"].shape == (1, 1, exported.model.config.vocab_size)


def test_a_layer_of_two_slots_is_exported(tmp_path: Path) -> None:
    export_onnx(make_model("wide", order=1, sub_dim=2, top_k=1, cape_half_layers=0), tmp_path / "onnx")


def test_a_directory_that_is_no_export_is_named(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"is not an export: it has no ramnet\.json"):
        OnnxSession(tmp_path)


def test_the_target_of_a_link_is_replaced(mixed: Exported, tmp_path: Path, quick_build: None) -> None:
    (tmp_path / "kept").mkdir()
    (tmp_path / "link").symlink_to("kept")
    export_onnx(mixed.model, tmp_path / "link")
    assert (tmp_path / "link").readlink() == Path("kept")
    assert sorted(entries(tmp_path / "kept")) == sorted(FILES)


def test_the_current_folder_is_not_replaced(mixed: Exported, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    for name in (".", tmp_path):
        with pytest.raises(ValueError, match="is the current folder, which cannot be replaced"):
            export_onnx(mixed.model, name)


def test_weights_that_all_lie_in_the_graphs_have_their_file_and_digest_too(
    mixed: Exported, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import onnx_ir

    whole = {kind: onnx_ir.load(mixed.onnx / f"{kind}.onnx") for kind in ports.GRAPHS}
    monkeypatch.setattr(graphs, "build", lambda model, kind, kernels: onnx_ir.external_data.load_to_model(whole[kind]))
    monkeypatch.setattr(graphs, "_INLINE_BYTES", 10**9)
    export_onnx(mixed.model, tmp_path / "onnx")
    assert (tmp_path / "onnx" / "weights.bin").read_bytes() == b""
    ids = torch.tensor([[1, 2, 3]])
    assert torch.equal(OnnxSession(tmp_path / "onnx")(ids).logits, OnnxSession(mixed.onnx)(ids).logits)


def test_an_export_leaves_each_module_in_the_mode_it_was_in() -> None:
    model = make_model("wide").train()
    model.blocks[0].eval()
    modes = [module.training for module in model.modules()]
    graphs.build(model, "decode")
    assert [module.training for module in model.modules()] == modes


def test_an_export_does_not_change_the_random_state(mixed: Exported, tmp_path: Path, quick_build: None) -> None:
    torch.manual_seed(5)
    expected = torch.rand(3)
    torch.manual_seed(5)
    export_onnx(mixed.model, tmp_path / "onnx")
    assert torch.equal(torch.rand(3), expected)
