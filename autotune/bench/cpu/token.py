"""A token of a whole model as it is deployed: the C library in each precision against other runtimes."""

from __future__ import annotations

import tempfile
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch

from autotune.bench.cpu.language_model import COMPILED, TOLERANCE, Decoding, make_model
from autotune.bench.run import FLOOR, Candidate, Run, Table, check, torch_threads
from export.c.session import CModel
from ramnet import RamNetForCausalLM, RamState

ONNX, EXECUTORCH = "onnxruntime, bound state", "ExecuTorch"
BASE = "library float32"
# An integer's rounding changes which addresses are chosen, in a model of random weights more than in a trained one.
_ROUNDING = {"float32": TOLERANCE, "bfloat16": 0.05, "int8": 0.5, "int4": 1.0}


def library(precision: str) -> str:
    """Return the name of the library's row."""
    return f"library {precision}"


def floor(precision: str) -> str:
    """Return the name of the row that reads a token's weights, all but the embedding, once."""
    return f"{FLOOR} {precision}"


def token(run: Run, preset: str, threads: int, *, tokens: int, others: bool, floors: bool) -> Table | None:
    """Compare a token of the library in each precision.

    Args:
        tokens: tokens of a call.
        others: also run other runtimes.
        floors: also read the weights of each precision.
    """
    name = f"token {preset}"
    if not run.kernels:
        return None
    run.on_step(f"{name}: making the model")
    model = make_model(preset)
    with tempfile.TemporaryDirectory(prefix="ramnet-") as folder, torch_threads(threads):
        with torch.no_grad():
            expected = Decoding(model, RamState.zeros(model.config, 1))()
        forms: dict[str, Candidate] = {}
        read = run.dram(threads).read if floors else None  # has a buffer of gigabytes
        for precision in _ROUNDING:
            run.on_step(f"{name}: building {library(precision)}")
            made, size = deployed(model, precision, Path(folder), threads)
            found = torch.from_numpy(made.token(made.state(), 1)).reshape(expected.shape)
            check(library(precision), [found], [expected], _ROUNDING[precision])
            forms[library(precision)] = _tokens(made, tokens)
            if read is not None:
                forms[floor(precision)] = partial(read, tokens * size)
        for form, decoding in (_others(run, model, Path(folder), threads) if others else {}).items():
            run.on_step(f"{name}: checking {form}")
            with torch.no_grad():
                check(form, [decoding()], [expected], TOLERANCE)
            forms[form] = partial(_repeat, decoding, tokens)
        return run.compare(name, "batch 1, in place, as deployed", forms, base=BASE, calls=tokens, threads=threads)


def deployed(model: RamNetForCausalLM, precision: str, folder: Path, threads: int) -> tuple[CModel, int]:
    """Return the library with weights in a file, and the bytes of the weights that a token reads."""
    from lowering.aot import build, weights

    config = model.config
    path = folder / f"{precision}.safetensors"
    weights.save(path, weights.stored(dict(model.named_parameters(remove_duplicate=False)), config, precision), config)
    library = CModel(build.shared_library(config, precision), path, threads)
    return library, weights.read_by_token(config, precision)


def _tokens(model: CModel, count: int) -> Candidate:
    """Return a function that reads ``count`` tokens, which differ between calls."""
    state, random = model.state(), np.random.default_rng(0)

    def read() -> None:
        for token in random.integers(0, model.vocabulary, count):
            model.token(state, int(token))

    return read


def _repeat(call: Callable[[], Any], count: int) -> None:
    for _ in range(count):
        call()


def _others(run: Run, model: RamNetForCausalLM, folder: Path, threads: int) -> dict[str, Candidate]:
    """Return the other runtimes that are installed."""
    import lowering

    found: dict[str, Candidate] = {
        COMPILED: Decoding(lowering.compile(model, target=run.target), RamState.zeros(model.config, 1))
    }
    try:
        from export.onnx.build import export_onnx
        from export.onnx.session import OnnxSession
        from export.onnx.state import OnnxState

        run.on_step("exporting to ONNX")
        export_onnx(model, folder / "onnx")
        session = OnnxSession(folder / "onnx", threads=threads)
        found[ONNX] = Decoding(session, OnnxState.zeros(model.config, 1))
    except ImportError as error:
        run.notice(f"{ONNX} left out: {error}")
    try:
        from export.executorch.build import export_executorch

        run.on_step("exporting to ExecuTorch")
        export_executorch(model, folder / "executorch")
        found[EXECUTORCH] = _executorch(folder / "executorch", threads)
    except ImportError as error:
        run.notice(f"{EXECUTORCH} left out: {error}")
    return found


def _executorch(directory: Path, threads: int) -> Candidate:
    """Return a function that reads a token; its threads are of the whole process. Raises ImportError without it."""
    from executorch.extension.pybindings import _C

    from export.executorch.session import ExecutorchModel

    _C._unsafe_reset_threadpool(threads)  # before anything runs on it
    model = ExecutorchModel(directory)
    return lambda: model.token(1).view(1, 1, -1)
