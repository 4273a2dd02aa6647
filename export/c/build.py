"""Exports a model as a C library, verified against PyTorch."""

from __future__ import annotations

import shutil
import tempfile
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path

import numpy as np
import torch

from export import licence, manifest_card, process, quality
from export.c.session import LIBRARY, WEIGHTS, CModel
from export.folder import replaced
from export.libraries import need
from export.manifest import C_FORMAT, Manifest
from export.model import as_stored, float32, uncompiled
from export.samples import Samples
from lowering.aot import build, weights
from lowering.aot import calibration as calibrate
from lowering.model.as_built import is_as_built
from lowering.model.untouched import is_hooked
from lowering.targets import cpu_name
from ramnet import RamNetForCausalLM
from schedules.deployment import Deployment

HEADER, ARCHIVE, PROGRAM = "ramnet.h", "libramnet.a", "generate.c"
THIS_CPU = "cpu"
STAGES = 4


def export_c(
    model: RamNetForCausalLM,
    directory: str | Path,
    *,
    precision: str = "float32",
    target: str = THIS_CPU,
    deployment: Deployment | None = None,
    text: quality.HeldOut | None = None,
    calibration: Sequence[torch.Tensor] | None = None,
    on_progress: Callable[[str], None] = lambda stage: None,
) -> Manifest:
    """Export ``model`` to a folder with a C library, its header, the weights, samples and ramnet.json.

    Nothing is written unless the library, run by a process of its own, gives the logits of PyTorch within a tolerance.
    A library for another kind of processor is not run; ``ramnet verify`` repeats the check where it can be.

    Args:
        model: a model of any floating dtype, as ``RamNetForCausalLM`` builds it; what ``lowering.compile`` returned
            is exported as the model that it was given.
        directory: a missing or empty folder, or an earlier export, which is replaced.
        precision: the type of the weight matrices, a key of ``lowering.aot.weights.FILE_TYPES``.
        deployment: what ``ramnet tune-model`` found for this CPU, whose precision is used.
        target: "cpu" for this processor, or a key of ``lowering.aot.machines.TARGETS``.
        text: on which bits per byte are measured, if any.
        calibration: windows of text, int64 [length] each, that int4 is calibrated on, if any.
        on_progress: called with the name of each of the ``STAGES`` stages when it is finished.

    Raises:
        ValueError: if the library differs from PyTorch, the model, the precision or the target is refused, or
            ``directory`` holds files other than an export.
        OSError: if ``directory`` cannot be written. With any error, ``directory`` is not changed.
        ImportError: if TVM is not installed.
        RuntimeError: if there is no C compiler, or it fails.
    """
    need("tvm", extra="tvm")
    from lowering.aot.machines import TARGETS

    if target != THIS_CPU and target not in TARGETS:
        raise ValueError(f"target is {target!r}; it must be {THIS_CPU} or one of {', '.join(TARGETS)}")
    machines = TARGETS.get(target, ())
    model = uncompiled(model)
    loops = build.LOOPS
    if deployment is not None:
        precision = deployment.precision
        loops = build.Loops.of(deployment)
    weights.check(model.config, precision)
    check_as_built(model)
    build.compiler(machines)
    with replaced(Path(directory)) as aside:
        write_weights(model, precision, aside, calibration)
        on_progress("weights written")
        # A linker on a full disk says so in many lines, so the libraries are copied to where they belong.
        with tempfile.TemporaryDirectory(prefix="ramnet-") as place:
            build.write_libraries(model.config, precision, machines, Path(place), loops)
            for path in Path(place).iterdir():
                shutil.copy(path, aside)
        shutil.copy(Path(__file__).parents[1] / "examples" / "c" / PROGRAM, aside / PROGRAM)
        licence.copy(aside)
        on_progress("library built")
        found = Manifest.of(
            model.config,
            aside,
            ("ramnet", "torch", "apache-tvm"),
            format=C_FORMAT,
            precision=precision,
            deployment=deployment,
            target=cpu_name() if target == THIS_CPU else target,
        )
        found.save(aside)
        if build.runs_here(machines):
            found = found.model_copy(update={"error": process.check(aside)})
            on_progress("verified")
            threads = deployment.threads if deployment else 1
            library = CModel(aside / LIBRARY, aside / WEIGHTS, threads)
            speed = quality.speed(partial(library.token, library.state()), library.vocabulary, threads)
            measured = None if text is None else quality.measure(model, text, _logits(library))
            found = found.model_copy(update={"speed": speed, "quality": measured})
        found = manifest_card.add(found, aside)
        found.save(aside)
    on_progress("measured")
    return found


def check_as_built(model: RamNetForCausalLM) -> None:
    """Raise ValueError if a model was changed in a way that a library made from its configuration would leave out."""
    if not is_as_built(model, lambda: RamNetForCausalLM(model.config)) or is_hooked(model):
        raise ValueError(
            "the model was changed after it was built, by an adapter, a parametrisation, a hook or a subclass, which"
            " the library would leave out; merge it into the weights or remove it"
        )


def write_weights(
    model: RamNetForCausalLM, precision: str, directory: Path, calibration: Sequence[torch.Tensor] | None = None
) -> dict[str, torch.Tensor]:
    """Write the weights and the samples of a precision to ``directory``. Returns the tensors of the weights' file.

    ``calibration`` are windows of text, int64 [length] each, that int4 is calibrated on.
    """
    parameters: dict[str, torch.Tensor] = dict(model.named_parameters(remove_duplicate=False))
    moments = None
    if precision == "int4" and calibration is not None:
        moments = calibrate.moments(float32(model), calibration)
    stored = weights.stored(parameters, model.config, precision, moments)
    weights.save(directory / WEIGHTS, stored, model.config)
    Samples.of(as_stored(model, stored, precision)).save(directory)
    return stored


def _logits(library: CModel) -> Callable[[np.ndarray], np.ndarray]:
    state = library.state()

    def run(ids: np.ndarray) -> np.ndarray:
        state.reset()
        return library.tokens(state, ids, len(ids))

    return run
