"""Writes a model that runs in browsers and in Node, with a page that shows its memory."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path

from torch import Tensor

from export import licence, manifest, process
from export.c.build import check_as_built, write_weights
from export.folder import replaced
from export.quality import BYTES
from lowering import plain
from lowering.aot import wasm, weights
from ramnet import RamNetForCausalLM
from ramnet.state import write_safetensors

STAGES = 2
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


def export_web(
    model: RamNetForCausalLM,
    directory: str | Path,
    *,
    precision: str = "float32",
    on_progress: Callable[[str], None] = lambda stage: None,
) -> manifest.Manifest:
    """Export ``model`` to a folder that a web server can serve and that Node can load.

    Nothing is written unless Node gives the logits of PyTorch within a tolerance. Without Node, nothing is run, and
    ``ramnet verify`` repeats the check where it is installed.

    Args:
        model: a model as ``RamNetForCausalLM`` builds it, or what ``lowering.compile`` returned for one.
        directory: a missing or empty folder, or an earlier export, which is replaced.
        precision: the type of the weight matrices.
        on_progress: called with the name of each of the ``STAGES`` stages when it is finished.

    Raises:
        ValueError: if Node's logits differ, the model or the precision is refused, or ``directory`` holds other files.
        OSError: if ``directory`` cannot be written. With any error, ``directory`` is not changed.
        ImportError: if TVM is not installed.
        RuntimeError: if clang, wasm-ld or wasi-libc is missing, or fails.
    """
    model = plain(model)
    check_as_built(model)
    with replaced(Path(directory)) as aside:
        write_web(model, aside, precision)
        write_weights(model, precision, aside)
        licence.copy(aside)
        on_progress("page and module written")
        found = manifest.Manifest(
            format=manifest.WEB_FORMAT,
            config=model.config,
            precision=precision,
            target="wasm",
            text="bytes" if model.config.vocab_size == BYTES else None,
            versions=manifest.versions(("ramnet", "torch", "apache-tvm")),
            files=manifest.digests(aside),
        )
        found.save(aside)
        if shutil.which("node"):
            found = found.model_copy(update={"error": process.check(aside)})
            found.save(aside)
    on_progress("verified")
    return found
