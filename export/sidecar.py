"""``ramnet.json``: what an export says of itself."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, Self

from pydantic import BaseModel, ConfigDict, ValidationError

from ramnet import RamNetConfig
from ramnet.config import one_line
from ramnet.files import read_text, write_text_atomic

if TYPE_CHECKING:
    import onnx_ir

FILENAME = "ramnet.json"


class Port(BaseModel):
    """One input or output of a graph; sizes that may vary are names."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    name: str
    shape: list[int | str]
    dtype: str


class Graph(BaseModel):
    """One graph: its file, inputs and outputs."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    file: str
    inputs: list[Port]
    outputs: list[Port]

    @classmethod
    def of(cls, file: str, model: onnx_ir.Model) -> Self:
        def ports(values: Iterable[onnx_ir.Value]) -> list[Port]:
            return [
                Port(
                    name=value.name or "",
                    shape=[size if isinstance(size, int) else str(size) for size in value.shape or ()],
                    dtype=str(value.dtype.numpy()) if value.dtype else "",
                )
                for value in values
            ]

        return cls(file=file, inputs=ports(model.graph.inputs), outputs=ports(model.graph.outputs))


class Sidecar(BaseModel):
    """The content of ``ramnet.json``."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    format: Literal["ramnet-onnx-1"] = "ramnet-onnx-1"
    config: RamNetConfig
    opset: int
    graphs: dict[str, Graph]
    versions: dict[str, str]
    files: dict[str, str]  # SHA-256 of each
    largest_errors: dict[str, float]  # of the verification, by the name of the check
    schedules: dict[str, Any] | None  # for each op its record, or the default's knobs

    @classmethod
    def load(cls, directory: Path) -> Self:
        """Read and check an export's description.

        Raises:
            ValueError: where ``directory`` is no export, ``ramnet.json`` is damaged, or a file is missing or not the
                one that was exported.
        """
        path = directory / FILENAME
        if not path.is_file():
            raise ValueError(f"{directory} is not an export: it has no {FILENAME}")
        try:
            sidecar = cls.model_validate_json(read_text(path))
        except ValidationError as error:
            raise ValueError(f"{path} is damaged: {one_line(error)}") from None
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
    """The versions of what an export depends on."""
    return {name: version(name) for name in ("ramnet", "torch", "onnx", "onnxruntime", "onnxscript")}
