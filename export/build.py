"""Exports a model to ONNX, verified against PyTorch."""

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from export import graphs, verify
from export.folder import replaced
from export.libraries import need
from export.session import OnnxSession
from export.sidecar import DIGESTED, FILENAME, FORMAT, Graph, Sidecar, sha256, versions
from ramnet import RamNetForCausalLM

FILES = (*DIGESTED, FILENAME)

STAGES = 3 + verify.CHECKS


class VerificationError(ValueError):
    """The export differs from the model; ``checks`` holds the comparisons."""

    def __init__(self, checks: list[verify.Check]) -> None:
        failed = [check for check in checks if not check.passed]
        first = failed[0]
        super().__init__(
            f"{len(failed)} of {len(checks)} checks failed, first {first.name} at batch {first.batch}: off by"
            f" {first.error:.1e}, tolerance {first.tolerance:.0e}; nothing was written"
        )
        self.checks = checks


def export_onnx(
    model: RamNetForCausalLM,
    directory: str | Path,
    *,
    schedules: dict[str, Any] | None = None,
    on_progress: Callable[[str], None] = lambda stage: None,
) -> list[verify.Check]:
    """Export ``model`` to decode.onnx, prefill.onnx, weights.bin and ramnet.json in ``directory``.

    Nothing is written unless onnxruntime gives the results of PyTorch within a tolerance.

    Args:
        model: a model of any floating dtype; the graphs compute in float32.
        directory: a missing or empty folder, or an earlier export, which is replaced.
        schedules: records of the tuned kernels, to be stored in ramnet.json.
        on_progress: called with the name of each of the ``STAGES`` stages when it is finished.

    Returns:
        The comparisons that were made.

    Raises:
        VerificationError: if onnxruntime differs from PyTorch beyond the tolerance; it has ``checks``.
        ValueError: if ``directory`` holds files other than an export.
        OSError: if ``directory`` cannot be written. With any error, ``directory`` is not changed.
        ImportError: if onnx, onnxscript or onnxruntime is not installed.
    """
    need("onnx", "onnxscript", "onnxruntime")
    from export.translations import OPSET

    model = _float32(model)
    with replaced(Path(directory), FILES) as aside:
        models = {}
        for name in graphs.GRAPHS:
            models[name] = graphs.build(model, name)
            on_progress(f"{name}.onnx built")
        graphs.save(models, aside)
        verify.check_graphs(aside)
        on_progress("graphs checked")
        sidecar = Sidecar(
            format=FORMAT,
            config=model.config,
            opset=OPSET,
            graphs={kind: Graph.of(model.config, kind) for kind in graphs.GRAPHS},
            versions=versions(),
            files={file: sha256(aside / file) for file in DIGESTED},
            largest_errors={},
            schedules=schedules,
        )
        sidecar.save(aside)
        checks = []
        for check in verify.compare(model, OnnxSession(aside)):
            checks.append(check)
            on_progress(check.name)
        if not all(check.passed for check in checks):
            raise VerificationError(checks)
        errors = {f"{check.name}, batch {check.batch}": check.error for check in checks}
        sidecar.model_copy(update={"largest_errors": errors}).save(aside)
    return checks


def _float32(model: RamNetForCausalLM) -> RamNetForCausalLM:
    if all(p.dtype == torch.float32 and p.device.type == "cpu" for p in model.parameters()):
        return model
    return copy.deepcopy(model).to("cpu", torch.float32)
