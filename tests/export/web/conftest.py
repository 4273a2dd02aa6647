"""A model written for browsers, once for all tests of this folder."""

from __future__ import annotations

import hashlib
import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

from export.web import write_web
from tests.lowering.aot.c_library import TINY, model_of

pytest.importorskip("tvm", reason="the kernels need tvm: pip install 'ramnet[tvm]'")
for program in ("clang", "wasm-ld", "node"):
    if shutil.which(program) is None:
        pytest.skip(f"{program} is not installed", allow_module_level=True)


@pytest.fixture(scope="session")
def bundle(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """Returns the folder of a model by the precision of its weights."""
    made: dict[str, Path] = {}

    def folder_of(precision: str) -> Path:
        if precision not in made:
            folder = made[precision] = tmp_path_factory.mktemp(precision)
            names = write_web(model_of(TINY), folder, precision)
            digests = {name: hashlib.sha256((folder / name).read_bytes()).hexdigest() for name in names}
            description = {
                "format": "ramnet-c-1",
                "config": json.loads(TINY.to_json()),
                "precision": precision,
                "text": "bytes",
                "files": digests,
            }
            (folder / "ramnet.json").write_text(json.dumps(description))
        return made[precision]

    return folder_of
