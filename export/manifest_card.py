"""The model cards of the exports that a ``Manifest`` describes."""

from __future__ import annotations

from pathlib import Path
from typing import NamedTuple

from export import card
from export.card import Card
from export.manifest import C_FORMAT, EXECUTORCH_FORMAT, WEB_FORMAT, Manifest
from ramnet.files import sha256

_SHARED = {
    "samples.safetensors": "`ids` [T] and PyTorch's `logits` [T, V] after each of them, from the first state",
    "LICENSE": "the licence of the code",
}
_C = """
/* cc program.c libramnet.a -lm -pthread */
#include <stdio.h>

#include "ramnet.h"

int main(void) {
  static float logits[{vocabulary}];
  const int32_t prompt[] = {{ids}};
  ramnet_model* model;
  ramnet_state* state;
  if (ramnet_open("weights.safetensors", {threads}, &model) || ramnet_state_create(model, &state) ||
      ramnet_tokens(model, state, prompt, sizeof prompt / sizeof *prompt, logits, 1) || /* after the last one */
      ramnet_token(model, state, prompt[0], logits)) /* one token */
    return fprintf(stderr, "%s\\n", ramnet_message()), 1;
  ramnet_state_free(state);
  ramnet_close(model);
}
"""
_C_PYTHON = """
from export.c.session import CModel  # of the project that wrote this; it uses NumPy, not PyTorch

model = CModel("libramnet.so", "weights.safetensors", threads={threads})
state = model.state()
logits = model.tokens(state, [{ids}])  # [1, V], after the last one
logits = model.token(state, {id})  # [V]
state.save("state")  # RamState.load and the other runtimes read it
"""
_EXECUTORCH_PYTHON = """
from export.executorch.session import ExecutorchModel  # of the project that wrote this, pip install '.[executorch]'

model = ExecutorchModel(".")
logits = model.token({id})  # [V]
model.state.save("state")  # RamState.load and the other runtimes read it; assign to model.state
model.reset()
"""
_EXECUTORCH_CPP = """
// Both methods use one state, so they share their memory. generate.cpp is a whole program.{load}
Module model("model.pte", Module::LoadMode::Mmap, nullptr, nullptr, nullptr, /*share_memory_arenas=*/true);
model.load_method("forward");
model.load_method("reset");
int64_t id = {id};
const auto logits = model.forward(executorch::extension::from_blob(&id, {1, 1}, executorch::aten::ScalarType::Long));
model.execute("reset");  // forgets all tokens
"""
_LOAD = '\ndlopen("./libramnet_executorch.so", RTLD_NOW | RTLD_GLOBAL);  // runs its code'
_JAVASCRIPT = """
import { load } from "./ramnet.js"; // in a browser or in Node

const model = await load("."); // a URL, or a path in Node
const state = model.state();
let logits = model.tokens(state, [{ids}]); // after the last one
logits = model.token(state, {id});
const file = state.save(); // RamState.load and the other runtimes read it; state.load(file) reads theirs
"""


class _Texts(NamedTuple):
    """The fields of ``Card`` that are the same for all exports of a format."""

    library: str
    summary: str
    files: dict[str, str]
    calls: dict[str, str]
    where: str = ""


_OF = {
    C_FORMAT: _Texts(
        "c",
        "A RAM-Net language model as a C library for {target}, which needs libc, libm and threads alone:"
        " {precision} weights, one call a token.",
        {
            "libramnet.so": "the shared library",
            "libramnet.a": "the static library",
            "ramnet.h": "their interface",
            "weights.safetensors": "the weights, which are mapped into memory",
            "generate.c": "a program that continues a text",
            **_SHARED,
        },
        {"c": _C, "python": _C_PYTHON},
    ),
    EXECUTORCH_FORMAT: _Texts(
        "executorch",
        "A RAM-Net language model as an ExecuTorch program for {target} processor: {precision} weights, the state in"
        " mutable buffers, one call a token.",
        {
            "model.pte": "the program, with the weights",
            "libramnet_executorch.so": "the kernel of a token, in machine code for {target}",
            "generate.cpp": "a program that continues a text",
            **_SHARED,
        },
        {"cpp": _EXECUTORCH_CPP, "python": _EXECUTORCH_PYTHON},
    ),
    WEB_FORMAT: _Texts(
        "webassembly",
        "A RAM-Net language model for browsers and Node, as a WebAssembly module: {precision} weights, one call a"
        " token.",
        {
            "ramnet.wasm": "the model's code",
            "ramnet.js": "the module that loads it; `ramnet.d.ts` has its types",
            "weights.safetensors": "the weights",
            "index.html": "a page that writes text and shows the memory",
            **_SHARED,
        },
        {"js": _JAVASCRIPT},
        where=" in Node",
    ),
}


def add(manifest: Manifest, folder: Path) -> Manifest:
    """Write the model card of an export whose other files are in ``folder``. Returns the manifest with its digest."""
    texts, config = _OF[manifest.format], manifest.config
    ids = list(b"Hello") if manifest.text == "bytes" else [0]
    names = {"ids": ", ".join(map(str, ids)), "id": str(ids[0]), "vocabulary": str(config.vocab_size)}
    tuned = manifest.deployment
    names["threads"] = str(tuned.threads if tuned else 1)
    has_library = "libramnet_executorch.so" in manifest.files
    names["load"] = _LOAD if has_library else ""

    def filled(text: str) -> str:
        for name, value in names.items():
            text = text.replace(f"{{{name}}}", value)
        return text

    error = "not run where it was exported" if manifest.error is None else f"{manifest.error:.1e}"
    Card(
        library=texts.library,
        summary=texts.summary.format(target=manifest.target, precision=manifest.precision),
        files={
            name: text.format(target=manifest.target) for name, text in texts.files.items() if name in manifest.files
        },
        numbers={"relative error of the logits against PyTorch with the same weights": error},
        precision=manifest.precision,
        where=texts.where,
        notes=[] if tuned is None else [f"Tuned by `ramnet tune-model` on {manifest.target}: {tuned}."],
        speed=manifest.speed,
        quality=manifest.quality,
        calls={language: filled(text) for language, text in texts.calls.items()},
    ).save(config, folder)
    return manifest.model_copy(update={"files": {**manifest.files, card.FILENAME: sha256(folder / card.FILENAME)}})
