"""Models written for browsers, once for all tests of a run."""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

from ramnet.files import locked
from tests.lowering.aot.c_library import TINY, model_of

# Layers of different sizes.
CONFIG = TINY.model_copy(update={"num_heads": [2, 4], "value_dim": [32, 16], "order": [4, 2], "top_k": [8, 4]})


@pytest.fixture(scope="session")
def bundle(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """Returns the folder of a model by the precision of its weights."""
    from export.web import export_web

    for program in ("clang", "wasm-ld", "node"):
        if shutil.which(program) is None:
            pytest.skip(f"{program} is not installed")
    base = tmp_path_factory.getbasetemp()
    shared = (base.parent if "PYTEST_XDIST_WORKER" in os.environ else base) / "web"

    def folder_of(precision: str) -> Path:
        folder = shared / precision
        with locked(shared / f"{precision}.lock"):
            if not (folder / "ramnet.json").exists():
                export_web(model_of(CONFIG), folder, precision=precision)
        return folder

    return folder_of
