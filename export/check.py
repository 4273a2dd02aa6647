"""Repeats the verification of an exported model: ``ramnet verify``. It does not need the model, nor PyTorch unless the
export does."""

from __future__ import annotations

import json
import sys
import tempfile
from pathlib import Path
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from export.manifest import EXECUTORCH_FORMAT, Manifest
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
    manifest = Manifest.load(directory)
    samples = Samples.load(directory)
    tolerance = TOLERANCE[manifest.precision]
    run = _executorch_logits if manifest.format == EXECUTORCH_FORMAT else _c_logits
    error = samples.error(run(directory, samples.ids))
    if not error <= tolerance:
        raise ValueError(f"the logits of {directory} are off by {error:.1e}; the tolerance is {tolerance:.0e}")
    return Result(error, tolerance, len(samples.ids))


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


if __name__ == "__main__":
    print(json.dumps(check(Path(sys.argv[1])).error))  # noqa: T201 - the answer to ``export.process``
