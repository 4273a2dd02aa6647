"""What the descriptions of all exports share: reading ``ramnet.json`` and checking the files that it names."""

from __future__ import annotations

from collections.abc import Iterable
from importlib.metadata import version
from pathlib import Path
from typing import Any, Literal, TypeVar, get_args

from pydantic import BaseModel, ValidationError

from export.folder import DESCRIPTION
from ramnet.config import BYTES, RamNetConfig, one_line
from ramnet.files import read_text, sha256, write_text_atomic

_Kind = TypeVar("_Kind", bound=BaseModel)


def load(kind: type[_Kind], directory: Path) -> _Kind:
    """Read a description and check the digest of each of its ``files``; other files in ``directory`` are ignored.

    Raises:
        ValueError: if ``directory`` is not an export or has another format, ``ramnet.json`` is damaged, or a file is
            missing or differs from what was exported.
    """
    path = directory / DESCRIPTION
    if not path.is_file():
        raise ValueError(f"{directory} is not an export: it has no {DESCRIPTION}")
    try:
        description: Any = kind.model_validate_json(read_text(path))
    except ValidationError as error:
        first = error.errors()[0]
        if first["loc"] == ("format",) and first["type"] == "literal_error":
            formats = " or ".join(get_args(kind.model_fields["format"].annotation))
            raise ValueError(
                f"{path} has the format {first['input']!r:.40}; it must be {formats}: export again"
            ) from None
        raise ValueError(f"{path} is damaged: {' '.join(one_line(error).split())}") from None
    for name, digest in description.files.items():
        if not (directory / name).is_file():
            raise ValueError(f"{directory} is incomplete: {name} is missing; export the checkpoint again")
        if sha256(directory / name) != digest:
            raise ValueError(f"{directory / name} is damaged: it differs from what was exported; export again")
    found: _Kind = description
    return found


def save(description: BaseModel, directory: Path) -> None:
    write_text_atomic(directory / DESCRIPTION, description.model_dump_json(indent=2) + "\n")


def digests(directory: Path) -> dict[str, str]:
    """Return the SHA-256 digest of each file in ``directory`` but ``ramnet.json``."""
    return {path.name: sha256(path) for path in sorted(directory.iterdir()) if path.name != DESCRIPTION}


def versions(packages: Iterable[str]) -> dict[str, str]:
    """Return the versions of the packages that an export depends on."""
    return {name: version(name) for name in packages}


def text_of(config: RamNetConfig) -> Literal["bytes"] | None:
    """Return how text becomes ids: "bytes" for a vocabulary of 256."""
    return "bytes" if config.vocab_size == BYTES else None
