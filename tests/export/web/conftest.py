"""Models written for browsers, once for all tests of a run."""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from export.quality import HeldOut
from ramnet.files import locked
from ramnet.loss import IGNORED
from tests.lowering.aot.c_library import TINY, model_of

# Layers of different sizes.
CONFIG = TINY.model_copy(update={"num_heads": [2, 4], "value_dim": [32, 16], "order": [4, 2], "top_k": [8, 4]})
# Windows on which the bundles' bits per byte are measured; the last label of each does not count.
IDS = np.random.default_rng(0).integers(0, 256, (3, 40))
LABELS = np.where(np.arange(40) < 39, np.roll(IDS, -1, 1), IGNORED)


@pytest.fixture(scope="session")
def bundle(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """Returns the folder of a model by the precision of its weights."""
    from export.web import export_web

    text = HeldOut("of a test", IDS, LABELS)
    for program in ("clang", "wasm-ld", "node"):
        if shutil.which(program) is None:
            pytest.skip(f"{program} is not installed")
    base = tmp_path_factory.getbasetemp()
    shared = (base.parent if "PYTEST_XDIST_WORKER" in os.environ else base) / "web"

    def folder_of(precision: str) -> Path:
        folder = shared / precision
        with locked(shared / f"{precision}.lock"):
            if not (folder / "ramnet.json").exists():
                export_web(model_of(CONFIG), folder, precision=precision, text=text)
        return folder

    return folder_of
