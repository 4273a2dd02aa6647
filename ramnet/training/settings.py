"""A file with the options of ``ramnet train text``."""

from __future__ import annotations

import tomllib
from pathlib import Path
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, ValidationError

from ramnet.config import one_line
from ramnet.files import read_text


class Settings(BaseModel):
    """The options that a file may have, under their names on the command line with "_" for "-".

    Ranges are checked where the options are used, as on the command line.
    """

    model_config = ConfigDict(extra="forbid", strict=True)

    preset: str | None = None
    data: list[str] | None = None
    tokenizer: str | None = None
    length: int | None = None
    packed: bool = False
    carry: bool = False
    output: str | None = None
    steps: int | None = None
    seconds: float | None = None
    batch_size: int | None = None
    micro_batch: int | None = None
    learning_rate: float | None = None
    final_learning_rate: float | None = None
    warmup_steps: int | None = None
    weight_decay: float | None = None
    clip_norm: float | None = None
    precision: Literal["float32", "bfloat16"] | None = None
    recompute: bool | None = None
    parallel: Literal["ddp", "fsdp"] | None = None
    seed: int | None = None
    checkpoint_seconds: float | None = None


def read(path: Path) -> dict[str, Any]:
    """Return the options of a TOML file by the names of their parameters.

    Raises ValueError, naming the file, if it is not TOML or has an option that is unknown or of another type; OSError
    if it cannot be read.
    """
    try:
        found = Settings.model_validate(tomllib.loads(read_text(path)))
    except tomllib.TOMLDecodeError as error:
        raise ValueError(f"{path} is not a TOML file: {error}") from None
    except ValidationError as error:
        raise ValueError(f"{path}: {one_line(error)}") from None
    if found.packed and found.carry:
        raise ValueError(f"{path}: packed and carry are both true; rows are of one kind")
    return found.model_dump(exclude_none=True)
