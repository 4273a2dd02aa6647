"""Writes a model that runs in browsers and in Node, with a page that shows its memory."""

from __future__ import annotations

import shutil
from pathlib import Path

from torch import Tensor

from lowering.aot import wasm, weights
from ramnet import RamNetForCausalLM
from ramnet.state import write_safetensors

PAGE = Path(__file__).parent / "web"
WASM, WEIGHTS = "ramnet.wasm", "weights.safetensors"


def write_web(model: RamNetForCausalLM, directory: Path, precision: str = "float32") -> list[str]:
    """Write the WebAssembly module, the weights, the JavaScript module and the page to an existing folder.

    ``ramnet.json`` is not written. It must state ``config``, ``precision``, ``text`` ("bytes", or None if the model
    does not say how text becomes ids), and in ``files`` the SHA-256 digests of all files that are named here.

    Args:
        precision: the type of the weight matrices, a key of ``lowering.aot.matrix.FORMATS``.

    Returns:
        the names of the files.

    Raises:
        ValueError: if the library cannot be built for the model with this precision.
        ImportError: if TVM is not installed.
        RuntimeError: if clang, wasm-ld or wasi-libc is missing, or fails.
        OSError: if a file cannot be written.
    """
    wasm.write_wasm(model.config, precision, directory / WASM)
    parameters: dict[str, Tensor] = dict(model.named_parameters(remove_duplicate=False))
    write_safetensors(directory / WEIGHTS, weights.stored(parameters, model.config, precision))
    pages = sorted(path for path in PAGE.iterdir() if path.is_file())
    for path in pages:
        shutil.copyfile(path, directory / path.name)
    return [WASM, WEIGHTS, *(path.name for path in pages)]
