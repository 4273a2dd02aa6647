"""Files that are either whole or absent."""

from __future__ import annotations

import ctypes
import fcntl
import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from glob import escape
from pathlib import Path


@contextmanager
def written_aside(path: str | Path) -> Iterator[Path]:
    """A path in a temporary folder beside ``path``. What the block writes there takes the place of ``path`` when it
    ends well, once it is on the disk, and is removed when it does not.

    Missing folders are made, and removed too when the block fails. OSError, naming ``path``, where it cannot be
    written.
    """
    path = Path(path)
    missing = [folder for folder in path.parents if not folder.exists()]  # deepest first
    nearest = path.parents[len(missing)]
    if not nearest.is_dir():
        raise NotADirectoryError(f"{path} cannot be written: {nearest} is not a folder")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with folder_aside(path) as folder:
            aside = folder / path.name
            yield aside
            sync(aside)
            aside.replace(path)
            sync(path.parent)
    except OSError as error:
        if error.strerror is None:
            raise  # a sentence of ours
        named = type(error)(f"{path} cannot be written: {error.strerror}")
        named.errno = error.errno
        raise named from None
    finally:
        with suppress(OSError):  # a folder that holds something stays
            for each in missing:
                each.rmdir()


@contextmanager
def folder_written_aside(folder: Path) -> Iterator[Path]:
    """A temporary folder. Its files take the place of ``folder`` when the block ends well, once they are on the disk,
    and are removed when it does not.

    ``folder`` is absolute and no link. At no time is it absent, or neither the old nor the new one, on a file system
    that exchanges names. OSError, of the system, where it cannot be written.
    """
    # On the same file system, and without making parents that may not be needed.
    ancestor = next(path for path in folder.parents if path.exists())
    with folder_aside(ancestor / folder.name) as aside:
        new, old = aside / "new", aside / "old"
        new.mkdir()
        yield new
        for path in (*new.iterdir(), new):
            sync(path)
        folder.parent.mkdir(parents=True, exist_ok=True)
        if not folder.exists():
            new.rename(folder)
        elif not _exchange(new, folder):
            folder.rename(old)
            try:
                new.rename(folder)
            except BaseException:
                old.rename(folder)
                raise
        sync(folder.parent)


def _exchange(path: Path, other: Path) -> bool:
    """Give each the other's name at one stroke; False where the system or the file system cannot."""
    rename = getattr(ctypes.CDLL(None), "renameat2", None)
    here, exchange = -100, 2  # AT_FDCWD, RENAME_EXCHANGE
    return rename is not None and rename(here, os.fsencode(path), here, os.fsencode(other), exchange) == 0


_ASIDE = ".aside"


@contextmanager
def folder_aside(path: Path) -> Iterator[Path]:
    """A temporary folder beside ``path``, removed when the block ends; what killed processes left of theirs is, too."""
    clear_asides(path.parent, path.name)
    lock: int | None = None
    while True:
        folder = Path(tempfile.mkdtemp(dir=path.parent, prefix=f".{path.name}.", suffix=_ASIDE))
        try:
            lock = _lock(folder)
        except (FileNotFoundError, BlockingIOError):  # another process took it for one left behind
            continue
        except OSError:  # a file system without locks: there nothing is cleared, either
            pass
        break
    try:
        yield folder
    finally:
        shutil.rmtree(folder, ignore_errors=True)
        if lock is not None:
            os.close(lock)


def clear_asides(folder: Path, name: str | None = None) -> None:
    """Remove the temporary folders in ``folder``, beside the file ``name`` or any, whose processes ended."""
    for left in folder.glob(f".{escape(name) if name else '*'}.*{_ASIDE}"):
        with suppress(OSError):  # BlockingIOError where its process is at work
            lock = _lock(left)
            shutil.rmtree(left, ignore_errors=True)
            os.close(lock)


def _lock(folder: Path) -> int:
    """A handle that holds the folder's lock, of which the system lets go when the process ends, however it ends.

    BlockingIOError where another one holds it, FileNotFoundError where the folder is gone.
    """
    handle = os.open(folder, os.O_RDONLY)
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        if os.fstat(handle).st_nlink == 0:
            raise FileNotFoundError(f"{folder} was removed")
    except OSError:
        os.close(handle)
        raise
    return handle


def sync(path: Path) -> None:
    """Wait until a file, or what a folder lists, is on the disk."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


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


@contextmanager
def locked(path: Path) -> Iterator[None]:
    """Hold the file ``path``, made empty where it is missing, against other processes within the block.

    The block may put another file in its place; those who waited then wait for that one. The system lets go of it when
    a process ends, however it ends.
    """
    import fcntl  # which Windows has not

    path.parent.mkdir(parents=True, exist_ok=True)
    while True:
        with path.open("ab") as file:  # a lock over NFS needs a file that is open for writing
            fcntl.flock(file, fcntl.LOCK_EX)
            if path.exists() and os.path.samestat(os.fstat(file.fileno()), path.stat()):
                yield
                return


def require_writable(*paths: Path) -> None:
    """Before long work whose results go to ``paths``: nothing is written and no folder made.

    Raises:
        OSError: naming the path, where a file cannot be written.
        ValueError: where two of the paths are one file, or something other than a file lies there.
    """
    for path in paths:
        if os.path.lexists(path) and not path.is_file():
            raise ValueError(f"{path} is {'a folder' if path.is_dir() else 'not a regular file'}; it must be a file")
        if [os.path.realpath(other) for other in paths].count(os.path.realpath(path)) > 1:
            raise ValueError(f"{path} is to be two files at once; name another for one of them")
        folder = next(folder for folder in path.absolute().parents if os.path.lexists(folder))
        try:
            if path.is_file():
                path.open("ab").close()
            tempfile.TemporaryFile(dir=folder).close()
        except OSError as error:
            raise OSError(f"{path} cannot be written: {error.strerror}") from None
