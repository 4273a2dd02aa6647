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
# ramnet-onnx-1 had one position for all rows; this format has one per row.
FORMAT: Literal["ramnet-onnx-2"] = "ramnet-onnx-2"
DIGESTED = (*(f"{kind}.onnx" for kind in GRAPHS), WEIGHTS)


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

    Raises ValueError if a graph or a digest is missing, or a graph does not fit ``config``.
    """

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True)

    format: Literal["ramnet-onnx-2"]
    config: RamNetConfig
    opset: int
    graphs: dict[str, Graph]
    versions: dict[str, str]
    files: dict[str, str]  # the SHA-256 digest of each file of DIGESTED
    largest_errors: dict[str, float]  # the error of each check of the verification, by its name
    schedules: dict[str, Any] | None  # the record of each op, or the default's knobs

    @model_validator(mode="after")
    def _consistent(self) -> Self:
        for field, names, expected in (("graphs", self.graphs, GRAPHS), ("files", self.files, DIGESTED)):
            if sorted(names) != sorted(expected):
                raise ValueError(f"{field} names {sorted(names)}; it must name {sorted(expected)}")
        for kind, graph in self.graphs.items():
            if graph.file != f"{kind}.onnx":
                raise ValueError(f"graphs.{kind}.file is {graph.file!r}; it must be {kind}.onnx")
            if wrong := difference(self.config, kind, graph.inputs, graph.outputs):
                raise ValueError(f"graphs.{kind} {wrong}")
        return self

    @classmethod
    def load(cls, directory: Path) -> Self:
        """Read an export's description and check its files; other files in ``directory`` are ignored.

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


def sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def versions() -> dict[str, str]:
    """Return the versions of the packages that an export depends on."""
    return {name: version(name) for name in ("ramnet", "torch", "onnx", "onnxruntime", "onnxscript")}
