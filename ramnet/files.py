"""Files that are either whole or absent."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path


@contextmanager
def written_aside(path: str | Path) -> Iterator[Path]:
    """A temporary path beside ``path``, renamed over it when the block ends well and removed when it does not.

    Missing folders are made, and removed too when the block fails. OSError where ``path`` cannot be written.
    """
    path = Path(path)
    missing = [folder for folder in path.parents if not folder.exists()]  # deepest first
    nearest = path.parents[len(missing)]
    if not nearest.is_dir():
        raise NotADirectoryError(f"{path} cannot be written: {nearest} is not a folder")
    path.parent.mkdir(parents=True, exist_ok=True)
    handle, name = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.", suffix=path.suffix)
    os.close(handle)
    aside = Path(name)
    try:
        yield aside
        # mkstemp makes files private; give the result what the user's umask grants.
        umask = os.umask(0)
        os.umask(umask)
        aside.chmod(0o666 & ~umask)
        aside.replace(path)
    finally:
        aside.unlink(missing_ok=True)
        with suppress(OSError):  # a folder that holds something stays
            for folder in missing:
                folder.rmdir()


def write_text_atomic(path: str | Path, text: str) -> None:
    """Write ``text`` as UTF-8, whole or not at all."""
    with written_aside(path) as aside:
        aside.write_text(text, encoding="utf-8")


def read_text(path: str | Path) -> str:
    """The file's text; ValueError where it is not UTF-8."""
    try:
        return Path(path).read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise ValueError(f"{path} is not a text file: byte {error.start} is not UTF-8") from None
