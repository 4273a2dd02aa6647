"""``ramnet.json``, the description of an export."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Literal, Self

from pydantic import BaseModel, ConfigDict, model_validator

from export import card, description, licence, samples
from export.description import text_of
from export.manifest import Quality, Speed
from export.onnx.ports import GRAPHS, WEIGHTS, Port, difference, inputs, outputs
from ramnet.config import RamNetConfig
from schedules.deployment import OnnxDeployment

# ramnet-onnx-1 had one position for all rows, ramnet-onnx-2 no digests of samples and of a model card.
FORMAT: Literal["ramnet-onnx-3"] = "ramnet-onnx-3"
LIBRARY = "libramnet_onnxruntime.so"
# The files of every export but ramnet.json, and those of some.
DIGESTED = (*(f"{kind}.onnx" for kind in GRAPHS), WEIGHTS, samples.FILENAME, licence.FILENAME, card.FILENAME)
ORT_FILES = tuple(f"{kind}.ort" for kind in GRAPHS)
PRECISIONS = ("float32", "float16", "int8")


class Graph(BaseModel):
    """One graph: its file, inputs and outputs."""

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True)

    file: str
    inputs: list[Port]
    outputs: list[Port]

    @classmethod
    def of(cls, config: RamNetConfig, kind: str) -> Self:
        """Return the description of the graph ``kind`` of a model."""
        return cls(file=f"{kind}.onnx", inputs=list(inputs(config, kind)), outputs=list(outputs(config, kind)))


class Sidecar(BaseModel):
    """The content of ``ramnet.json``.

    Raises ValueError if a graph or a digest is missing, or a graph or ``initial_state`` does not fit ``config``.

    Attributes:
        precision: the type of the weights of embedding and projections.
        kernels: the processor that the library of custom operators is built for; None without custom operators.
        text: "bytes" if each byte of a text is an id; None if ids come from a tokenizer.
        initial_state: the value of all elements of each tensor before the first token; a list if it differs between
            layers.
        files: the SHA-256 digest of each file of the folder but ramnet.json.
        largest_errors: the error of each check of the verification, by its name.
        agreement: the fraction of tokens whose most probable next token was PyTorch's.
        schedules: the record of each op, or the default's knobs.
        deployment: found by ``ramnet tune-model`` on the processor of ``speed``; None is onnxruntime's default.
        speed: of the decode graph; None if it was not measured.
        quality: what the precision costs; None if it was not measured.
    """

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True)

    format: Literal["ramnet-onnx-3"]
    config: RamNetConfig
    opset: int
    precision: Literal["float32", "float16", "int8"]
    kernels: str | None
    text: Literal["bytes"] | None
    initial_state: dict[str, float | list[float]]
    graphs: dict[str, Graph]
    versions: dict[str, str]
    files: dict[str, str]
    largest_errors: dict[str, float]
    agreement: float
    schedules: dict[str, Any] | None
    deployment: OnnxDeployment | None = None
    speed: Speed | None = None
    quality: Quality | None = None

    @model_validator(mode="after")
    def _consistent(self) -> Self:
        files = (*DIGESTED, *([LIBRARY] if self.kernels else []), *(ORT_FILES if ORT_FILES[0] in self.files else []))
        for field, names, expected in (("graphs", self.graphs, GRAPHS), ("files", self.files, files)):
            if sorted(names) != sorted(expected):
                raise ValueError(f"{field} names {sorted(names)}; it must name {sorted(expected)}")
        if self.text != text_of(self.config):
            raise ValueError(f"text is {self.text!r}; for this vocabulary it must be {text_of(self.config)!r}")
        if self.initial_state != initial_state(self.config):
            raise ValueError(f"initial_state is {self.initial_state}; it must be {initial_state(self.config)}")
        for kind, graph in self.graphs.items():
            if graph.file != f"{kind}.onnx":
                raise ValueError(f"graphs.{kind}.file is {graph.file!r}; it must be {kind}.onnx")
            if wrong := difference(self.config, kind, graph.inputs, graph.outputs):
                raise ValueError(f"graphs.{kind} {wrong}")
        return self

    @classmethod
    def load(cls, directory: Path) -> Self:
        """Read a description and check the digests of its files; raises as ``export.description.load`` does."""
        return description.load(cls, directory)

    def save(self, directory: Path) -> None:
        description.save(self, directory)


def initial_state(config: RamNetConfig) -> dict[str, float | list[float]]:
    """Return the state before the first token: z_0 = 1/M (paper, step 5), and zeros."""
    conv: dict[str, float | list[float]] = {"conv": 0.0} if config.conv_layers else {}
    mass = [1 / layer.slots for layer in config.layers]
    return {"memory": 0.0, "mass": mass if len(set(mass)) > 1 else mass[0], **conv, "position": 0.0}
