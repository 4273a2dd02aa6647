"""Writes a model that runs in browsers and in Node, with a page that shows its memory."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Sequence
from pathlib import Path

from torch import Tensor

from export import licence, manifest_card, node, process, quality
from export.c.build import check_as_built, write_weights
from export.folder import replaced
from export.manifest import WEB_FORMAT, Manifest
from export.model import uncompiled
from lowering.aot import wasm, weights
from ramnet import RamNetForCausalLM

STAGES = 3
PAGE = Path(__file__).parent / "web"
WASM = "ramnet.wasm"


def export_web(
    model: RamNetForCausalLM,
    directory: str | Path,
    *,
    precision: str = "float32",
    text: quality.HeldOut | None = None,
    calibration: Sequence[Tensor] | None = None,
    on_progress: Callable[[str], None] = lambda stage: None,
) -> Manifest:
    """Export ``model`` to a folder that a web server can serve and that Node can load.

    Nothing is written unless Node gives the logits of PyTorch within a tolerance. Without Node, nothing is run, and
    ``ramnet verify`` repeats the check where it is installed.

    Args:
        model: a model as ``RamNetForCausalLM`` builds it, or what ``lowering.compile`` returned for one.
        directory: a missing or empty folder, or an earlier export, which is replaced.
        precision: the type of the weight matrices.
        text: on which bits per byte are measured in Node, if any.
        calibration: windows of text, int64 [length] each, that int4 is calibrated on, if any.
        on_progress: called with the name of each of the ``STAGES`` stages when it is finished.

    Raises:
        ValueError: if Node's logits differ, the model or the precision is refused, its state is larger than
            WebAssembly can have, or ``directory`` holds other files.
        OSError: if ``directory`` cannot be written. With any error, ``directory`` is not changed.
        ImportError: if TVM is not installed.
        RuntimeError: if clang, wasm-ld or wasi-libc is missing, or fails.
    """
    model = uncompiled(model)
    weights.check(model.config, precision)
    check_as_built(model)
    state = 4 * sum(each.num_heads * each.slots * (each.value_dim + 1) for each in model.config.layers)
    if state >= 2**31:  # what the library refuses there
        raise ValueError(f"a state of the model has {state / 1e9:.1f} GB; in WebAssembly it must be below 2.1 GB")
    wasm.compiler()
    with replaced(Path(directory)) as aside:
        write_weights(model, precision, aside, calibration)
        wasm.write_wasm(model.config, precision, aside / WASM)
        for path in PAGE.iterdir():
            if path.is_file():
                shutil.copyfile(path, aside / path.name)
        licence.copy(aside)
        on_progress("page and module written")
        found = Manifest.of(
            model.config,
            aside,
            ("ramnet", "torch", "apache-tvm"),
            format=WEB_FORMAT,
            precision=precision,
            target="wasm",
        )
        found.save(aside)
        if shutil.which("node"):
            found = found.model_copy(update={"error": process.check(aside)})
            on_progress("verified")
            measured = None
            if text is not None:
                logits = node.of_windows(aside, text.ids[: quality.windows(model)], model.config.vocab_size)
                measured = quality.measure(model, text, lambda _: next(logits))
            found = found.model_copy(update={"speed": node.speed(aside), "quality": measured})
        found = manifest_card.add(found, aside)
        found.save(aside)
    on_progress("measured")
    return found
