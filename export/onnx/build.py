"""Exports a model to ONNX, verified against PyTorch."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from export import card, licence, quality, samples
from export.description import digests, text_of, versions
from export.folder import DESCRIPTION, replaced
from export.libraries import need
from export.model import float32
from export.onnx import apart, describe, graphs, ort_format, verify
from export.onnx.model import OnnxModel
from export.onnx.ports import GRAPHS
from export.onnx.precision import convert
from export.onnx.session import OnnxSession
from export.onnx.sidecar import (
    DIGESTED,
    FORMAT,
    LIBRARY,
    ORT_FILES,
    PRECISIONS,
    Graph,
    Sidecar,
    initial_state,
)
from lowering.targets import cpu_name
from ramnet import RamNetForCausalLM
from ramnet.config import RamNetConfig
from schedules.deployment import OnnxDeployment
from schedules.of_model import of_model
from schedules.records import choose

FILES = (*DIGESTED, DESCRIPTION)  # of every export
_OPTIONAL = (LIBRARY, *ORT_FILES)

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
    precision: str = "float32",
    kernels: bool = False,
    target: str = "cpu",
    ort: bool = False,
    deployment: OnnxDeployment | None = None,
    text: quality.HeldOut | None = None,
    on_progress: Callable[[str], None] = lambda stage: None,
) -> list[verify.Check]:
    """Export ``model`` to decode.onnx, prefill.onnx, weights.bin, samples.safetensors, a model card README.md, and
    ramnet.json with the digests of all files.

    Nothing is written unless onnxruntime gives the results of PyTorch within a tolerance.

    Args:
        model: a model of any floating dtype, compiled or not. The state is float32.
        directory: a missing or empty folder, or an earlier export, which is replaced.
        precision: the type of the weights of embedding and projections, a key of ``verify.TOLERANCES``. With "int8",
            activations are rounded to int8 before products, and the graphs need onnxruntime's own operators.
        kernels: run each layer's memory on the tuned kernels, as a custom operator in libramnet_onnxruntime.so, which
            is built for ``target`` and lies beside the graphs. The check then runs in a process of its own.
        target: "cpu" for this machine's processor, "x86-64", "x86-64-v3" or "x86-64-v4".
        ort: also write decode.ort and prefill.ort, in onnxruntime's own format.
        deployment: what ``ramnet tune-model`` found for this CPU, whose precision and kernels are used.
        text: on which bits per byte are measured, if any.
        on_progress: called with the name of each of the ``STAGES`` stages when it is finished.

    Returns:
        The comparisons that were made.

    Raises:
        VerificationError: if onnxruntime differs from PyTorch beyond the tolerance; it has ``checks``.
        ValueError: if ``directory`` holds files other than an export, or a setting is out of range.
        OSError: if ``directory`` cannot be written. With any error, ``directory`` is not changed.
        ImportError: if onnx, onnxscript or onnxruntime is not installed, or TVM with ``kernels``.
        RuntimeError: with ``kernels``, if there is no C compiler, or the library crashes the process that checks it.
    """
    need("onnx", "onnxscript", "onnxruntime")
    if deployment is not None:
        precision, kernels = deployment.precision, deployment.kernels
    if precision not in PRECISIONS:
        raise ValueError(f"precision is {precision!r}; it must be one of {', '.join(PRECISIONS)}")
    from export.onnx.kernels import build as build_library
    from export.onnx.translations import OPSET

    model = float32(model)
    with replaced(Path(directory), (*FILES, *_OPTIONAL)) as aside:
        if kernels:
            build_library(model.config, aside / LIBRARY, target)
        models = {}
        for name in GRAPHS:
            models[name] = graphs.build(model, name, kernels)
            convert(models[name], precision)
            on_progress(f"{name}.onnx built")
        graphs.save(models, aside)
        verify.check_graphs(aside, {"ramnet", "com.microsoft"} if kernels else {"com.microsoft"})
        on_progress("graphs checked")
        licence.copy(aside)
        for later in (samples.FILENAME, card.FILENAME):
            (aside / later).touch()
        sidecar = Sidecar(
            format=FORMAT,
            config=model.config,
            opset=OPSET,
            precision=precision,  # type: ignore[arg-type] # pydantic checks it
            kernels=target if kernels else None,
            text=text_of(model.config),
            initial_state=initial_state(model.config),
            graphs={kind: Graph.of(model.config, kind) for kind in GRAPHS},
            versions=versions(("ramnet", "torch", "onnx", "onnxruntime", "onnxscript")),
            files=digests(aside),
            largest_errors={},
            agreement=1.0,
            schedules=_schedules(model.config, cpu_name() if target == "cpu" else ""),
            deployment=deployment,
        )
        sidecar.save(aside)
        checks = []
        for check in apart.compare(model, aside) if kernels else verify.compare(model, OnnxSession(aside)):
            checks.append(check)
            on_progress(check.name)
        if not all(check.passed for check in checks):
            raise VerificationError(checks)
        found: dict[str, Any] = {
            "largest_errors": {f"{check.name}, batch {check.batch}": check.error for check in checks},
            "agreement": sum(check.agreement for check in checks) / len(checks),
        }
        run = OnnxModel(aside, untuned_threads=1)
        ids = samples.Samples.of(model).ids
        row = ids.astype(np.int64)[None]
        samples.Samples(ids, run.prefill(row)[0][0]).save(aside)
        if ort:
            ort_format.save(run, row, aside, aside / LIBRARY if kernels else None)
        state = run.state()
        threads = deployment.threads if deployment else 1
        found["speed"] = quality.speed(
            lambda token: run.step(np.array([[token]]), state), run.config.vocab_size, threads
        )
        if text is not None:
            found["quality"] = quality.measure(model, text, lambda ids: run.prefill(ids.astype(np.int64)[None])[0][0])
        described = sidecar.model_copy(update=found)
        describe.save_card(described, checks, aside)
        described.model_copy(update={"files": digests(aside)}).save(aside)
    return checks


def _schedules(config: RamNetConfig, device: str) -> dict[str, Any]:
    """Return, for each op of the model, the record that its kernel on a CPU would use, or the default's knobs."""
    choices = {workload.name: choose(workload, "cpu", device) for workload in of_model(config)}
    return {
        name: choice.record.model_dump() if choice.record else {"default": choice.schedule.model_dump()}
        for name, choice in choices.items()
    }
