"""The path by which a shared library is loaded."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory


@contextmanager
def new_path(library: Path) -> Iterator[str]:
    """Yield a path of ``library``, a link, that was never used before.

    The system knows a loaded library by its path, so that a process which has loaded one would go on running it after
    another export has replaced the file.
    """
    with TemporaryDirectory(prefix="ramnet-") as folder:
        link = Path(folder) / library.name
        link.symlink_to(library.resolve())
        yield str(link)
