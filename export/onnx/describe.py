"""The model card of an ONNX export."""

from __future__ import annotations

from pathlib import Path

from export import licence, samples
from export.card import Card
from export.onnx.sidecar import LIBRARY, ORT_FILES, Sidecar
from export.onnx.verify import Check

_FILES = {
    "decode.onnx": "one token: `input_ids` [batch, 1]",
    "prefill.onnx": "any number of tokens: `input_ids` [batch, tokens]",
    "weights.bin": "the weights of both graphs",
    samples.FILENAME: "`ids` [T] and the `logits` [T, V] that they give from the first state",
    LIBRARY: "custom operators of the domain `ramnet`, in machine code for {kernels}",
    ORT_FILES[0]: "decode.onnx with its weights, in onnxruntime's own format",
    ORT_FILES[1]: "prefill.onnx with its weights, in onnxruntime's own format",
    licence.FILENAME: "the licence of the code",
}
_PYTHON = """
import numpy as np
from export.onnx.model import OnnxModel  # of the project that wrote this; OnnxSession takes PyTorch's tensors

model = OnnxModel(".")
logits, state = model.prefill(np.array([{ids}]))  # [1, T, V], and the state after the last token
logits = model.step(np.array([[{id}]]), state)  # one token, [1, 1, V]; the state is updated in place
"""
_CPP = """
Ort::SessionOptions options;{register}
Ort::Session decode(env, "decode.onnx", options);
// Each tensor of the state is one buffer, bound as input and as output: a token then copies no memory. Only the
// position needs two buffers; copy the output to the input after each token.
Ort::IoBinding binding(decode);
binding.BindInput("past_recurrent.memory.0", memory0);   // zeros
binding.BindOutput("present_recurrent.memory.0", memory0);
binding.BindInput("past_recurrent.mass.0", mass0);       // 1/{slots} in every element
binding.BindOutput("present_recurrent.mass.0", mass0);
// … the other tensors, input_ids and logits alike; ramnet.json lists names, types and sizes.
decode.Run(Ort::RunOptions(), binding);
"""


def save_card(sidecar: Sidecar, checks: list[Check], directory: Path) -> None:
    """Write the model card; ``directory`` has all other files."""
    kernels = sidecar.kernels and ("this kind of processor" if sidecar.kernels == "cpu" else sidecar.kernels)
    operators = "standard operators" if not kernels else "the tuned kernels of its memory as custom operators"
    register = f'\noptions.RegisterCustomOpsLibrary("./{LIBRARY}");  // runs its code' if kernels else ""
    tuned, processor = sidecar.deployment, sidecar.speed and sidecar.speed.processor
    slots = str(sidecar.config.layers[0].slots)
    ids, one = ('list(b"Hello")', "32") if sidecar.text == "bytes" else ("[0]", "0")
    found = {name: text.format(kernels=kernels) for name, text in _FILES.items() if (directory / name).exists()}
    card = Card(
        library="onnxruntime",
        summary=f"A RAM-Net language model for ONNX Runtime: {sidecar.precision} weights, {operators},"
        f" opset {sidecar.opset}.",
        files=found,
        numbers={
            "largest error of the logits against PyTorch in float32": f"{max(check.logits for check in checks):.1e}",
            "largest error of the state": f"{max(check.state for check in checks):.1e}",
            "tokens whose most probable next token is PyTorch's": f"{sidecar.agreement:.2%}",
        },
        precision=sidecar.precision,
        speed=sidecar.speed,
        quality=sidecar.quality,
        calls={
            "python": _PYTHON.replace("{ids}", ids).replace("{id}", one),
            "cpp": _CPP.replace("{register}", register).replace("{slots}", slots),
        },
        notes=[
            "`past_recurrent.NAME` is the state before the tokens and `present_recurrent.NAME` the state after them;"
            " `position`, int64 [batch], counts the tokens of each row. `slots.LAYER` are the slots that each token"
            " reads and writes; they cost nothing if they are not requested.",
            *([f"Tuned by `ramnet tune-model` for {processor}: {tuned}."] if tuned else []),
        ],
    )
    card.save(sidecar.config, directory)
