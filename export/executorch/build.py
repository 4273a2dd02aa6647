"""Exports a model to ExecuTorch, verified against PyTorch."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from export import licence, manifest_card, process, quality
from export.c.build import check_as_built
from export.executorch import program
from export.executorch.session import LIBRARY, PROGRAM, ExecutorchModel
from export.folder import replaced
from export.libraries import need
from export.manifest import EXECUTORCH_FORMAT, Manifest
from export.model import as_stored, float32
from export.samples import Samples
from lowering.aot import build, weights
from lowering.targets import cpu_name
from ramnet import RamNetForCausalLM

EXAMPLE = "generate.cpp"
STAGES = 3


def export_executorch(
    model: RamNetForCausalLM,
    directory: str | Path,
    *,
    kernels: bool = False,
    precision: str = "float32",
    text: quality.HeldOut | None = None,
    on_progress: Callable[[str], None] = lambda stage: None,
) -> Manifest:
    """Export ``model`` to model.pte, an ExecuTorch program of one token, with samples and ramnet.json.

    The program has the methods ``forward``, from ids int64 [1, 1] to logits float32 [1, 1, V], ``reset``, which
    resets the state to that before the first token, and ``config``, the model's configuration as JSON. The state is in
    mutable buffers, with the names of ``RamState.tensors``, and starts with its initial values. Nothing is written
    unless ExecuTorch, run by a process of its own, gives the logits of PyTorch within a tolerance.

    Args:
        model: a model of any floating dtype; the program computes in float32. What ``lowering.compile`` returned is
            exported as the model that it was given.
        directory: a missing or empty folder, or an earlier export, which is replaced.
        kernels: if False, the program has ExecuTorch's standard operators, with the products in XNNPACK, and runs on
            any processor. If True, it has one operator, a token that is compiled ahead of time for this processor, and
            libramnet_executorch.so has its kernel.
        precision: the type of the weight matrices, which is float32 without kernels. With them it is a key of
            ``lowering.aot.weights.FILE_TYPES``, and the token reads the weights as they are stored.
        text: on which bits per byte are measured, if any.
        on_progress: called with the name of each of the ``STAGES`` stages when it is finished.

    Raises:
        ValueError: if ExecuTorch differs from PyTorch, the precision is refused, ``directory`` holds files other than
            an export, or, with ``kernels``, the model was changed after it was built.
        OSError: if ``directory`` cannot be written. With any error, ``directory`` is not changed.
        ImportError: if executorch or, with ``kernels``, TVM is not installed.
        RuntimeError: if ``kernels`` are wanted and there is no C or C++ compiler, or it fails.
    """
    need("executorch", extra="executorch")
    model = float32(model)
    if kernels:
        _check_kernels_fit(model, precision)
    elif precision != "float32":
        raise ValueError(f"precision is {precision!r}; without kernels, ExecuTorch's program is float32")
    with replaced(Path(directory)) as aside:
        if kernels:
            _write_with_kernels(model, aside, precision)
        else:
            _write(model, aside)
        on_progress("program written")
        shutil.copy(Path(__file__).parents[1] / "examples" / "executorch" / EXAMPLE, aside / EXAMPLE)
        licence.copy(aside)
        found = Manifest.of(
            model.config,
            aside,
            ("ramnet", "torch", "executorch", *(["apache-tvm"] if kernels else [])),
            format=EXECUTORCH_FORMAT,
            precision=precision,
            target=cpu_name() if kernels else "any",
        )
        found.save(aside)
        found = found.model_copy(update={"error": process.check(aside)})
        on_progress("verified")
        run = ExecutorchModel(aside)
        speed = quality.speed(run.token, model.config.vocab_size, run.threads)
        measured = None if text is None else quality.measure(model, text, _logits(run))
        found = manifest_card.add(found.model_copy(update={"speed": speed, "quality": measured}), aside)
        found.save(aside)
    on_progress("measured")
    return found


def _check_kernels_fit(model: RamNetForCausalLM, precision: str) -> None:
    """Raise the errors of ``export_executorch`` for a model that the kernels cannot compute."""
    need("tvm", extra="tvm")
    from export.executorch.kernels import compiler

    weights.check(model.config, precision)
    check_as_built(model)
    build.compiler()
    compiler()


def _write(model: RamNetForCausalLM, directory: Path) -> None:
    """Write the program of standard operators, and its samples."""
    Samples.of(model).save(directory)
    program.write(program.Token(model), directory / PROGRAM)


def _write_with_kernels(model: RamNetForCausalLM, directory: Path, precision: str) -> None:
    """Write the program of one operator, its library, and samples of the weights as they are stored."""
    from export.executorch.kernels import KernelToken, write

    stored = weights.stored(dict(model.named_parameters(remove_duplicate=False)), model.config, precision)
    Samples.of(as_stored(model, stored, precision)).save(directory)
    token = KernelToken(stored, model.config, precision)
    program.write(token, directory / PROGRAM)
    write(token, directory / LIBRARY)


def _logits(runtime: ExecutorchModel) -> Callable[[NDArray[np.int32]], NDArray[np.float32]]:
    def run(ids: NDArray[np.int32]) -> NDArray[np.float32]:
        runtime.reset()
        return np.stack([runtime.token(int(token)).numpy() for token in ids])

    return run
