"""An ONNX export that was tuned, and the trials that tune it."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("tvm", reason="the search needs tvm: pip install 'ramnet[tvm]'")
pytest.importorskip("optuna", reason="the search needs optuna: pip install 'ramnet[tune]'")

from autotune.deployment.space import OnnxSpace
from autotune.deployment.stored import Stored
from autotune.deployment.trial import Request, Trials
from export.onnx import build
from export.onnx.model import OnnxModel
from export.onnx.session import OnnxSession
from export.onnx.sidecar import Sidecar
from schedules.deployment import OnnxDeployment
from tests.export.conftest import Exported


def test_a_tuned_export_runs_as_it_was_tuned(mixed: Exported, tmp_path: Path, quick_build: None) -> None:
    tuned = OnnxDeployment(precision="int8", kernels=False, threads=2, prompt_threads=3, spinning=False)
    build.export_onnx(mixed.model, tmp_path / "onnx", deployment=tuned)
    sidecar = Sidecar.load(tmp_path / "onnx")
    assert sidecar.deployment == tuned and sidecar.precision == "int8"
    assert sidecar.speed is not None and sidecar.speed.threads == 2
    assert str(tuned) in (tmp_path / "onnx" / "README.md").read_text()
    assert settings(OnnxModel(tmp_path / "onnx")) == settings(OnnxSession(tmp_path / "onnx")) == [(2, "0"), (3, "0")]
    assert settings(OnnxModel(tmp_path / "onnx", threads=1)) == [(1, "0"), (1, "0")]
    assert settings(OnnxModel(mixed.onnx, untuned_threads=4)) == [(4, "1"), (4, "1")]
    with pytest.raises(ValueError, match="threads is 0; it must be at least 1"):
        OnnxModel(tmp_path / "onnx", threads=0)


def settings(model: OnnxModel | OnnxSession) -> list[tuple[int, str]]:
    """Threads of decode and prefill, and whether they spin."""
    options = [model.graphs[kind]._session.get_session_options() for kind in ("decode", "prefill")]
    key = "session.intra_op.allow_spinning"
    return [(each.intra_op_num_threads, each.get_session_config_entry(key)) for each in options]


def test_a_trial_opens_exports_with_their_threads_times_and_judges(
    mixed: Exported, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def export(model: object, folder: Path, **options: Any) -> None:
        assert options == {"precision": "float32", "kernels": False}
        shutil.copytree(mixed.onnx, folder)

    monkeypatch.setattr(build, "export_onnx", export)
    config = mixed.model.config
    space = OnnxSpace(config, 2, kernels=False)
    stored = Stored(mixed.model, None, tmp_path, space)
    base = space.baseline
    stored.write(base)
    fewer = base.model_copy(update={"threads": 1})
    trials, options = Trials(), {"config": config, "folder": tmp_path, "base": base, "others": {"it": fewer}}
    found = trials.run(Request(**options, judge=True, rounds=1, seconds=0.0))
    assert found.bits is not None and found.bits[0] == pytest.approx(found.bits[1], rel=1e-4)
    prompts = trials.run(Request(**options, prompts=True, rounds=1, seconds=0.0))
    assert min(found.times["it"].seconds, prompts.times["it"].seconds) > 0
    assert [settings(each._model)[0] for each in trials.open.values()] == [(2, "1"), (1, "1")]
