"""Continues a text with a byte-level export: generate.py DIRECTORY TEXT BYTES. It needs numpy and onnxruntime alone.

An export with kernels holds a library, whose code is run: use it only if you trust where it comes from.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

import numpy as np
import onnxruntime


def main(directory: str, text: str, count: int) -> None:
    folder = Path(directory)
    description = json.loads((folder / "ramnet.json").read_text(encoding="utf-8"))
    tuned = description.get("deployment") or {}  # by `ramnet tune-model`

    def session(kind: str, threads: str) -> onnxruntime.InferenceSession:
        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = tuned.get(threads, 0)  # 0 leaves it to onnxruntime
        options.add_session_config_entry("session.intra_op.allow_spinning", str(int(tuned.get("spinning", True))))
        if description["kernels"]:
            options.register_custom_ops_library(str(folder / "libramnet_onnxruntime.so"))
        return onnxruntime.InferenceSession(folder / f"{kind}.onnx", options)

    prefill, decode = session("prefill", "prompt_threads"), session("decode", "threads")

    state = {}  # before the first token: each tensor has one value, and that of a mass is not 0
    for port in description["graphs"]["decode"]["inputs"][1:]:
        _, kind, *layer = port["name"].split(".")
        value = description["initial_state"][kind]
        value = value[int(layer[0])] if isinstance(value, list) else value  # if layers have different sizes
        state[port["name"]] = np.full([1 if size == "batch" else size for size in port["shape"]], value, port["dtype"])
    after = [name.replace("past_", "present_") for name in state]

    ids = np.array([list(text.encode())], np.int64)
    logits, *arrays = prefill.run(["logits", *after], {"input_ids": ids, **state})
    sys.stdout.buffer.write(text.encode())

    # Each tensor of the state is bound as input and as output, so that a token copies none; the position is copied.
    binding, token = decode.io_binding(), np.zeros((1, 1), np.int64)
    position, following = arrays[-1], np.zeros(1, np.int64)
    values = [onnxruntime.OrtValue.ortvalue_from_numpy(array) for array in (token, *arrays, following)]
    binding.bind_ortvalue_input("input_ids", values[0])
    binding.bind_output("logits")
    for past, present, value in zip(state, after, values[1:], strict=False):
        binding.bind_ortvalue_input(past, value)
        binding.bind_ortvalue_output(present, values[-1] if past.endswith("position") else value)
    for _ in range(count):
        token[:] = best = int(logits[0, -1].argmax())
        sys.stdout.buffer.write(bytes([best]))
        decode.run_with_iobinding(binding)
        logits = binding.get_outputs()[0].numpy()
        position[:] = following


if __name__ == "__main__":
    main(sys.argv[1], sys.argv[2], int(sys.argv[3]))
