"""``ramnet.json``, the description of an export."""

from __future__ import annotations

import hashlib
from importlib.metadata import version
from pathlib import Path
from typing import Any, Literal, Self

from pydantic import BaseModel, ConfigDict, ValidationError, model_validator

from export.graphs import GRAPHS, WEIGHTS
from export.ports import Port, difference, inputs, outputs
from ramnet import RamNetConfig
from ramnet.config import one_line
from ramnet.files import read_text, write_text_atomic

FILENAME = "ramnet.json"
# ramnet-onnx-1 had one position for all rows, ramnet-onnx-2 no digests of samples and of a model card.
FORMAT: Literal["ramnet-onnx-3"] = "ramnet-onnx-3"
SAMPLES, CARD, LIBRARY = "samples.safetensors", "README.md", "libramnet_onnxruntime.so"
# The files of every export but ramnet.json, and those of some.
DIGESTED = (*(f"{kind}.onnx" for kind in GRAPHS), WEIGHTS, SAMPLES, CARD)
ORT_FILES = tuple(f"{kind}.ort" for kind in GRAPHS)
PRECISIONS = ("float32", "float16", "int8")
BYTES = 256


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
        initial_state: the value of all elements of each tensor before the first token.
        files: the SHA-256 digest of each file of the folder but ramnet.json.
        largest_errors: the error of each check of the verification, by its name.
        agreement: the fraction of tokens whose most probable next token was PyTorch's.
        schedules: the record of each op, or the default's knobs.
    """

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True)

    format: Literal["ramnet-onnx-3"]
    config: RamNetConfig
    opset: int
    precision: Literal["float32", "float16", "int8"]
    kernels: str | None
    text: Literal["bytes"] | None
    initial_state: dict[str, float]
    graphs: dict[str, Graph]
    versions: dict[str, str]
    files: dict[str, str]
    largest_errors: dict[str, float]
    agreement: float
    schedules: dict[str, Any] | None

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
        """Read an export's description and check the digests of its files; other files there are ignored.

        Raises:
            ValueError: if ``directory`` is not an export or has another format, ``ramnet.json`` is damaged, or a file
                is missing or differs from what was exported.
        """
        path = directory / FILENAME
        if not path.is_file():
            raise ValueError(f"{directory} is not an export: it has no {FILENAME}")
        try:
            sidecar = cls.model_validate_json(read_text(path))
        except ValidationError as error:
            first = error.errors()[0]
            if first["loc"] == ("format",) and first["type"] == "literal_error":
                raise ValueError(
                    f"{path} has the format {first['input']!r:.40}; it must be {FORMAT}: export again"
                ) from None
            raise ValueError(f"{path} is damaged: {' '.join(one_line(error).split())}") from None
        for name, digest in sidecar.files.items():
            if not (directory / name).is_file():
                raise ValueError(f"{directory} is incomplete: {name} is missing; export the checkpoint again")
            if sha256(directory / name) != digest:
                raise ValueError(f"{directory / name} is damaged: it differs from what was exported; export again")
        return sidecar

    def save(self, directory: Path) -> None:
        write_text_atomic(directory / FILENAME, self.model_dump_json(indent=2) + "\n")


def initial_state(config: RamNetConfig) -> dict[str, float]:
    """Return the state before the first token: z_0 = 1/M (paper, step 5), and zeros."""
    conv = {"conv": 0.0} if config.conv_layers else {}
    return {"memory": 0.0, "mass": 1 / config.slots, **conv, "position": 0.0}


def text_of(config: RamNetConfig) -> Literal["bytes"] | None:
    """Return how text becomes ids: "bytes" for a vocabulary of 256."""
    return "bytes" if config.vocab_size == BYTES else None


def sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def versions() -> dict[str, str]:
    """Return the versions of the packages that an export depends on."""
    return {name: version(name) for name in ("ramnet", "torch", "onnx", "onnxruntime", "onnxscript")}
