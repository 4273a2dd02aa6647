"""Replaces the folder of an export as a whole."""

from __future__ import annotations

import errno
import json
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from ramnet.files import folder_written_aside

DESCRIPTION = "ramnet.json"
# Files of an export that other folders may have, too, and by which it is not known.
_COMMON = ("README.md", "LICENSE")


@contextmanager
def replaced(directory: Path, names: tuple[str, ...] = ()) -> Iterator[Path]:
    """Yield a new directory, which replaces ``directory`` after the block or is removed if the block raises.

    Args:
        directory: a missing or empty folder, or an earlier export of any format.
        names: files that an export may have, for one whose ``ramnet.json`` is lost.

    Raises:
        ValueError: if ``directory`` holds other files, is a file or a mount point, or is the current folder.
        OSError: raised in the block, such as for a full disk, with a message that names ``directory``.
    """
    if directory.exists():
        if not directory.is_dir():
            raise ValueError(f"{directory} is a file; an export needs a directory")
        if directory.resolve().is_mount():
            raise ValueError(f"{directory} is a mount point, which cannot be replaced; name a folder within it")
        known = {DESCRIPTION, *_listed(directory)}
        if any((directory / name).exists() for name in (DESCRIPTION, *names) if name not in _COMMON):
            known |= set(names)
        foreign = sorted(path.name for path in directory.iterdir() if path.name not in known)
        if foreign:
            raise ValueError(f"{directory} holds {foreign[0]}, which is not part of an export; name another directory")
        if directory.samefile(Path.cwd()):
            raise ValueError(f"{directory} is the current folder, which cannot be replaced; name another directory")
    # The target of a link is replaced, not the link.
    with _errors_name(directory), folder_written_aside(directory.resolve()) as aside:
        yield aside


def _listed(directory: Path) -> list[str]:
    """Return the files that the description of an earlier export names."""
    with suppress(OSError, ValueError, AttributeError):
        return list(json.loads((directory / DESCRIPTION).read_bytes()).get("files", {}))
    return []


@contextmanager
def _errors_name(directory: Path) -> Iterator[None]:
    """Raise an OSError again with a message that names ``directory`` instead of a temporary file or no file."""
    try:
        yield
    except OSError as error:
        problem = f"{directory} cannot be written: {error.strerror or error}"
        if error.errno == errno.ENOSPC:
            problem += f", there or in {tempfile.gettempdir()}, where parts are made"
        raise (OSError(error.errno, problem) if error.errno else OSError(problem)) from None  # numpy's have no errno
