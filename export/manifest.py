"""``ramnet.json``, the description of an exported model that runs without PyTorch and ONNX."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import Any, Literal, Self

from pydantic import BaseModel, ConfigDict, Field, field_validator

from export import description
from export.folder import DESCRIPTION
from ramnet.config import RamNetConfig
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
    agreement: float = Field(description="share of tokens after which both hold the same next token for most probable")


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
    def of(cls, config: RamNetConfig, directory: Path, packages: Iterable[str], **facts: Any) -> Self:
        """Describe the files in ``directory``; ``facts`` are the fields that neither they nor ``config`` determine."""
        return cls(
            config=config,
            text=description.text_of(config),
            versions=description.versions(packages),
            files=description.digests(directory),
            **facts,
        )

    @classmethod
    def load(cls, directory: Path) -> Self:
        """Read a description and check the digest of every file; raises as ``export.description.load`` does."""
        return description.load(cls, directory)

    def save(self, directory: Path) -> None:
        description.save(self, directory)
