"""The Transformer++ that our model is compared with, as an ONNX graph with a cache of keys and values.

Attention is onnxruntime's own operator GroupQueryAttention, which its exporters of language models use: it writes a
token's keys and values into the cache where they belong and reads only as many as there are. A graph of standard
operators copies the cache for each token, or reads all of it.
"""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from autotune.bench.peers.gguf_models import HEAD, INNER, LAYERS, VOCABULARY, WIDTH
from autotune.bench.run import Candidate

_EPSILON, _ROTARY_BASE = 1e-5, 10_000.0
GRAPH, WEIGHTS = "transformer.onnx", "transformer.bin"


class Sizes(NamedTuple):
    """Of a model whose heads have as many keys and values as queries."""

    vocabulary: int
    width: int
    inner: int
    layers: int
    heads: int

    @property
    def head(self) -> int:
        return self.width // self.heads


def as_many_parameters() -> Sizes:
    """Return the sizes of llama.cpp's model."""
    return Sizes(VOCABULARY, WIDTH, INNER, LAYERS["llama"], WIDTH // HEAD)


def weights(sizes: Sizes) -> dict[str, tuple[int, ...]]:
    """Return the shapes of the random weights by name; matrices are [inputs, outputs]."""
    s = sizes
    found: dict[str, tuple[int, ...]] = {"embedding": (s.vocabulary, s.width)}
    for i in range(s.layers):
        found |= {
            f"{i}.qkv": (s.width, 3 * s.width), f"{i}.output": (s.width, s.width),
            f"{i}.gate_up": (s.width, 2 * s.inner), f"{i}.down": (s.inner, s.width),
        }  # fmt: skip
    return found | {"head": (s.width, s.vocabulary)}


def rotations(sizes: Sizes, capacity: int) -> np.ndarray:
    """Return the angle of each pair of a head's elements at each position, [capacity, head / 2]."""
    pairs = np.arange(0, sizes.head, 2) / sizes.head
    return np.arange(capacity)[:, None] * _ROTARY_BASE**-pairs


def write(sizes: Sizes, folder: Path, capacity: int, scale: float = 0.02) -> Path:
    """Write a graph of one token, and random weights beside it.

    Inputs are ``ids`` int64 [1, 1], ``tokens`` int32 [1], the number of tokens that the cache holds before this one,
    ``all`` int32, which is one more, and ``past.KIND.LAYER`` [1, heads, capacity, head]. Outputs are ``logits``
    [1, 1, V] and ``present.KIND.LAYER``.
    """
    import onnx
    from onnx import TensorProto, helper

    s, random = sizes, np.random.default_rng(0)
    shapes = weights(sizes)
    stored, offset = [], 0
    with (folder / WEIGHTS).open("wb") as file:
        for name, shape in shapes.items():
            values = random.standard_normal(shape, np.float32) * np.float32(scale)
            file.write(values.data)
            tensor = TensorProto(name=name, dims=shape, data_type=TensorProto.FLOAT)
            tensor.data_location = TensorProto.EXTERNAL
            for key, at in (("location", WEIGHTS), ("offset", offset), ("length", values.nbytes)):
                tensor.external_data.add(key=key, value=str(at))
            stored.append(tensor)
            offset += values.nbytes
    angles = rotations(sizes, capacity)
    constants = {"ones": np.ones(s.width), "cos": np.cos(angles), "sin": np.sin(angles)}
    stored += [onnx.numpy_helper.from_array(x.astype(np.float32), name) for name, x in constants.items()]

    nodes: list[Any] = []

    def node(kind: str, inputs: list[str], outputs: list[str], **settings: Any) -> str:
        nodes.append(helper.make_node(kind, inputs, outputs, **settings))
        return outputs[0]

    def norm(x: str, name: str) -> str:
        return node("RMSNormalization", [x, "ones"], [name], epsilon=_EPSILON)

    x = node("Gather", ["embedding", "ids"], ["x"])
    for i in range(s.layers):
        qkv = node("MatMul", [norm(x, f"{i}.normed"), f"{i}.qkv"], [f"{i}.projected"])
        past, present = ([f"{when}.{kind}.{i}" for kind in ("key", "value")] for when in ("past", "present"))
        attended = node(
            "GroupQueryAttention", [qkv, "", "", *past, "tokens", "all", "cos", "sin"], [f"{i}.attended", *present],
            domain="com.microsoft", num_heads=s.heads, kv_num_heads=s.heads, do_rotary=1,
        )  # fmt: skip
        mixed = node("MatMul", [attended, f"{i}.output"], [f"{i}.mixed"])
        x = node("Add", [x, mixed], [f"{i}.middle"])
        both = node("MatMul", [norm(x, f"{i}.ffn"), f"{i}.gate_up"], [f"{i}.both"])
        node("Split", [both], [f"{i}.gate", f"{i}.up"], axis=-1, num_outputs=2)
        gate = node("Mul", [f"{i}.gate", node("Sigmoid", [f"{i}.gate"], [f"{i}.sigmoid"])], [f"{i}.silu"])
        down = node("MatMul", [node("Mul", [gate, f"{i}.up"], [f"{i}.inner"]), f"{i}.down"], [f"{i}.down_out"])
        x = node("Add", [x, down], [f"{i}.x"])
    node("MatMul", [norm(x, "normed"), "head"], ["logits"])

    def value(name: str, shape: list[int], kind: int = TensorProto.FLOAT) -> Any:
        return helper.make_tensor_value_info(name, kind, shape)

    held = [s.heads, capacity, s.head]
    caches = [f"{kind}.{i}" for i in range(s.layers) for kind in ("key", "value")]
    graph = helper.make_graph(
        nodes, "transformer",
        [
            value("ids", [1, 1], TensorProto.INT64), value("tokens", [1], TensorProto.INT32),
            value("all", [], TensorProto.INT32), *(value(f"past.{name}", [1, *held]) for name in caches),
        ],
        [value("logits", [1, 1, s.vocabulary]), *(value(f"present.{name}", [1, *held]) for name in caches)],
        stored,
    )  # fmt: skip
    opsets = [helper.make_opsetid("", 23), helper.make_opsetid("com.microsoft", 1)]
    path = folder / GRAPH
    onnx.save(helper.make_model(graph, opset_imports=opsets, ir_version=10), str(path))
    return path


class Session:
    """The graph in onnxruntime, with its cache bound as input and output."""

    def __init__(self, path: Path, threads: int) -> None:
        import onnxruntime
        from onnxruntime import OrtValue

        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = threads
        # Threads look for work within a token, and not while other forms are timed.
        options.add_session_config_entry("session.force_spinning_stop", "1")
        self._session = onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
        self._random = np.random.default_rng(0)
        self._ids = np.zeros((1, 1), np.int64)
        self._tokens, self._all = np.zeros(1, np.int32), np.zeros((), np.int32)
        self.cache: dict[str, np.ndarray] = {}
        self._binding = self._session.io_binding()
        for name, array in (("ids", self._ids), ("tokens", self._tokens), ("all", self._all)):
            self._binding.bind_ortvalue_input(name, OrtValue.ortvalue_from_numpy(array))
        for port in self._session.get_inputs():
            if port.name.startswith("past."):
                name = port.name.removeprefix("past.")
                # Pages that were never written share one page of zeros, which stays in the CPU's cache.
                self.cache[name] = next(iter(self.cache.values())).copy() if self.cache else self._keys(port.shape)
                held = OrtValue.ortvalue_from_numpy(self.cache[name])
                self._binding.bind_ortvalue_input(port.name, held)
                self._binding.bind_ortvalue_output(f"present.{name}", held)
        self._logits = np.zeros(self._session.get_outputs()[0].shape, np.float32)
        self._binding.bind_ortvalue_output("logits", OrtValue.ortvalue_from_numpy(self._logits))

    def _keys(self, shape: list[int]) -> np.ndarray:
        return self._random.standard_normal(shape, np.float32)

    def token(self, token: int, tokens: int) -> np.ndarray:
        """Read a token after ``tokens`` others. Returns the logits [V], which the next call overwrites."""
        self._ids[...], self._tokens[...], self._all[...] = token, tokens, tokens + 1
        self._session.run_with_iobinding(self._binding)
        return self._logits.reshape(-1)

    def after(self, tokens: int, count: int) -> Candidate:
        """Return a function that reads ``count`` tokens after ``tokens`` others."""
        return partial(self._decode, tokens, count)

    def _decode(self, tokens: int, count: int) -> None:
        for i in range(count):
            logits = self.token(int(self._random.integers(len(self._logits.reshape(-1)))), tokens + i)
        if not np.isfinite(logits).all():
            raise ValueError("onnxruntime gives logits that are not finite")
