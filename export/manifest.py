"""``ramnet.json``, the description of an exported model that runs without PyTorch and ONNX."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable
from importlib.metadata import version
from pathlib import Path
from typing import Literal, Self

from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator

from export.folder import DESCRIPTION
from ramnet.config import RamNetConfig, one_line
from ramnet.files import read_text, write_text_atomic
from schedules.deployment import Deployment

C_FORMAT: Literal["ramnet-c-1"] = "ramnet-c-1"
EXECUTORCH_FORMAT: Literal["ramnet-executorch-1"] = "ramnet-executorch-1"
WEB_FORMAT: Literal["ramnet-web-1"] = "ramnet-web-1"


class Quality(BaseModel):
    """What the precision costs, measured on text that the model was not trained on."""

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True)

    text: str = Field(description="where the text is from")
    tokens: int = Field(gt=0)
    bits_per_byte: float
    float32: float = Field(description="bits per byte of PyTorch in float32")
    agreement: float = Field(description="share of tokens after which both hold the same next byte for most probable")


class Speed(BaseModel):
    """The time of a token where the model was exported."""

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True)

    token_seconds: float = Field(description="median")
    threads: int
    processor: str


class Manifest(BaseModel):
    """The content of ``ramnet.json``. Raises ValueError if it names a file outside the folder."""

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True)

    format: Literal["ramnet-c-1", "ramnet-executorch-1", "ramnet-web-1"]
    config: RamNetConfig
    precision: str
    target: str = Field(description="the processor that the library is compiled for, or any")
    text: Literal["bytes"] | None = Field(description="how text becomes ids; None if the model does not say")
    versions: dict[str, str]
    deployment: Deployment | None = Field(default=None, description="found by `ramnet tune-model`; None is the default")
    error: float | None = Field(default=None, description="relative L2 error of the logits; None if not run here")
    speed: Speed | None = None
    quality: Quality | None = None
    files: dict[str, str] = Field(description="the SHA-256 digest of each other file")

    @field_validator("files")
    @classmethod
    def _within(cls, files: dict[str, str]) -> dict[str, str]:
        for name in files:
            if name in ("", ".", "..", DESCRIPTION) or set(name) & set("/\\\0"):
                raise ValueError(f"files names {name!r}; it must name files of the folder")
        return files

    @classmethod
    def load(cls, directory: Path) -> Self:
        """Read a description and check the digest of every file; other files in ``directory`` are ignored.

        Raises:
            ValueError: if ``directory`` is not an export or has another format, ``ramnet.json`` is damaged, or a file
                is missing or differs from what was exported.
        """
        path = directory / DESCRIPTION
        if not path.is_file():
            raise ValueError(f"{directory} is not an export: it has no {DESCRIPTION}")
        try:
            manifest = cls.model_validate_json(read_text(path))
        except ValidationError as error:
            first = error.errors()[0]
            if first["loc"] == ("format",) and first["type"] == "literal_error":
                formats = f"{C_FORMAT} or {EXECUTORCH_FORMAT}"
                raise ValueError(f"{path} has the format {first['input']!r:.40}; it must be {formats}") from None
            raise ValueError(f"{path} is damaged: {' '.join(one_line(error).split())}") from None
        for name, digest in manifest.files.items():
            if not (directory / name).is_file():
                raise ValueError(f"{directory} is incomplete: {name} is missing; export the checkpoint again")
            if sha256(directory / name) != digest:
                raise ValueError(f"{directory / name} is damaged: it differs from what was exported; export again")
        return manifest

    def save(self, directory: Path) -> None:
        write_text_atomic(directory / DESCRIPTION, self.model_dump_json(indent=2) + "\n")


def digests(directory: Path) -> dict[str, str]:
    """Return the SHA-256 digest of each file in ``directory`` but ``ramnet.json``."""
    return {path.name: sha256(path) for path in sorted(directory.iterdir()) if path.name != DESCRIPTION}


def sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def versions(packages: Iterable[str]) -> dict[str, str]:
    """Return the versions of the packages that an export depends on."""
    return {name: version(name) for name in packages}
