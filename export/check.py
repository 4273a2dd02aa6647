"""Repeats the verification of an exported model: ``ramnet verify``. It needs neither the model nor PyTorch, except for
ExecuTorch, whose Python runtime needs PyTorch's libraries."""

from __future__ import annotations

import json
import sys
import tempfile
from contextlib import suppress
from pathlib import Path
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from export import node
from export.folder import DESCRIPTION
from export.manifest import C_FORMAT, EXECUTORCH_FORMAT, WEB_FORMAT, Manifest
from export.onnx.model import OnnxModel
from export.samples import TOLERANCE, Samples


class Result(NamedTuple):
    """The relative L2 error of an export's logits on its samples."""

    error: float
    tolerance: float
    tokens: int


def check(directory: Path) -> Result:
    """Check the digests of an export, run it on its samples and compare its logits with PyTorch's.

    Raises:
        ValueError: if a file is missing or damaged, or the logits differ by more than the tolerance.
        OSError: if the library cannot be loaded here.
    """
    if _is_onnx(directory):
        model = OnnxModel(directory)
        precision: str = model.sidecar.precision
        samples = Samples.load(directory)
        found = _onnx_logits(model, samples.ids)
    else:
        manifest = Manifest.load(directory)
        precision = manifest.precision
        samples = Samples.load(directory)
        found = _RUN[manifest.format](directory, samples.ids)
    tolerance = TOLERANCE[precision]
    error = samples.error(found)
    if not error <= tolerance:
        raise ValueError(f"the logits of {directory} are off by {error:.1e}; the tolerance is {tolerance:.0e}")
    return Result(error, tolerance, len(samples.ids))


def _is_onnx(directory: Path) -> bool:
    """Return whether the description is that of an ONNX export, which has a loader of its own."""
    with suppress(OSError, ValueError, AttributeError):
        return str(json.loads((directory / DESCRIPTION).read_bytes()).get("format")).startswith("ramnet-onnx")
    return False


def _onnx_logits(model: OnnxModel, ids: NDArray[np.int32]) -> NDArray[np.float32]:
    """Read half of the tokens as a block, and the others one by one, with the state updated in place."""
    rows, half = ids.astype(np.int64)[None], len(ids) // 2
    first, state = model.prefill(rows[:, :half])
    return np.concatenate([first, *(model.step(rows[:, t : t + 1], state) for t in range(half, len(ids)))], 1)[0]


def _c_logits(directory: Path, ids: NDArray[np.int32]) -> NDArray[np.float32]:
    """Read half of the tokens one by one, and the others as a block with the state from a file."""
    from export.c.session import LIBRARY, WEIGHTS, CModel

    model = CModel(directory / LIBRARY, directory / WEIGHTS)
    state, half = model.state(), len(ids) // 2
    first = [model.token(state, int(token)) for token in ids[:half]]
    with tempfile.TemporaryDirectory(prefix="ramnet-") as folder:
        state.save(Path(folder) / "state.safetensors")
        other = model.state()
        other.load(Path(folder) / "state.safetensors")
    return np.concatenate([first, model.tokens(other, ids[half:], len(ids) - half)])


def _executorch_logits(directory: Path, ids: NDArray[np.int32]) -> NDArray[np.float32]:
    """Read some tokens, reset the state, and read all; the second half with the state that another program had."""
    from export.executorch.session import ExecutorchModel

    model, other, half = ExecutorchModel(directory), ExecutorchModel(directory), len(ids) // 2
    for token in ids[:4]:
        model.token(int(token))
    model.reset()
    first = [model.token(int(token)).numpy() for token in ids[:half]]
    other.state = model.state
    return np.stack([*first, *(other.token(int(token)).numpy() for token in ids[half:])])


_RUN = {C_FORMAT: _c_logits, EXECUTORCH_FORMAT: _executorch_logits, WEB_FORMAT: node.logits}


if __name__ == "__main__":
    print(json.dumps(check(Path(sys.argv[1])).error))  # noqa: T201 - the answer to ``export.process``
