"""Atomic writes and file locks: a reader finds either the previous file or the complete new one."""

from __future__ import annotations

import ctypes
import fcntl
import hashlib
import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from functools import cache
from glob import escape
from pathlib import Path
from typing import IO, Any


@contextmanager
def written_aside(path: str | Path) -> Iterator[Path]:
    """Yield a temporary path beside ``path``. The file that the block writes there replaces ``path`` after it is synced
    to disk, or is removed if the block raises.

    Missing parent folders are created, and removed again if the block raises.

    Raises:
        OSError: if ``path`` cannot be written; the message names it.
    """
    path = Path(path)
    if not path.name:
        raise IsADirectoryError(f"'{path}' cannot be written: it is not the name of a file")
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
            raise  # raised by this project, with a message of its own
        named = type(error)(f"{path} cannot be written: {error.strerror}")
        named.errno = error.errno
        raise named from None
    finally:
        with suppress(OSError):  # rmdir fails for a folder that is not empty, which is to stay
            for each in missing:
                each.rmdir()


@contextmanager
def safetensors_written_aside(path: str | Path) -> Iterator[Path]:
    """Do as ``written_aside`` for a file that safetensors writes, whose errors are raised as OSError."""
    from safetensors import SafetensorError

    with written_aside(path) as aside:
        try:
            yield aside
            # safetensors makes files that only their owner can read; this one is read by whom the umask lets.
            usual = aside.with_name("usual")
            usual.touch()
            shutil.copymode(usual, aside)
        except SafetensorError as error:  # raised for a full disk, among others; it is not an OSError
            raise OSError(f"{path} cannot be written: {error}") from None


@contextmanager
def folder_written_aside(folder: Path) -> Iterator[Path]:
    """Yield a temporary folder. It replaces ``folder`` after its files are synced to disk, or is removed if the block
    raises.

    ``folder`` must be absolute and not a link. The replacement is atomic on file systems that support
    RENAME_EXCHANGE. Raises the system's OSError if ``folder`` cannot be written.
    """
    # The nearest existing ancestor is on the same file system, and no parent has to be created before the block ends.
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
    """Exchange two names atomically. Returns False if the system or the file system does not support it."""
    rename = getattr(ctypes.CDLL(None), "renameat2", None)
    here, exchange = -100, 2  # AT_FDCWD, RENAME_EXCHANGE
    return rename is not None and rename(here, os.fsencode(path), here, os.fsencode(other), exchange) == 0


_ASIDE = ".aside"


@contextmanager
def folder_aside(path: Path) -> Iterator[Path]:
    """Yield a temporary folder beside ``path`` and remove it afterwards, and first those that killed processes left."""
    clear_asides(path.parent, path.name)
    lock: int | None = None
    while True:
        folder = Path(tempfile.mkdtemp(dir=path.parent, prefix=f".{path.name}.", suffix=_ASIDE))
        try:
            lock = _lock(folder)
        except (FileNotFoundError, BlockingIOError):  # another process is removing it as one left behind
            continue
        except OSError:  # the file system has no locks, so no process removes folders left there
            pass
        break
    try:
        yield folder
    finally:
        shutil.rmtree(folder, ignore_errors=True)
        if lock is not None:
            os.close(lock)


def clear_asides(folder: Path, name: str | None = None) -> None:
    """Remove temporary folders of processes that have ended: those in ``folder`` made for the file ``name``, or all."""
    for left in folder.glob(f".{escape(name) if name else '*'}.*{_ASIDE}"):
        with suppress(OSError):  # BlockingIOError if its process still runs
            lock = _lock(left)
            shutil.rmtree(left, ignore_errors=True)
            os.close(lock)


def _lock(folder: Path) -> int:
    """Return a file descriptor that holds the folder's lock. The system releases the lock when the process ends.

    Raises BlockingIOError if another process holds the lock, and FileNotFoundError if the folder was removed.
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
    """Flush a file, or the entries of a folder, to disk."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def write_text_atomic(path: str | Path, text: str) -> None:
    """Write ``text`` as UTF-8, atomically."""
    with written_aside(path) as aside:
        aside.write_text(text, encoding="utf-8")


@contextmanager
def safetensors_read(path: str | Path) -> Iterator[None]:
    """Raise ValueError, naming the file, if it is missing or the block, which reads it, finds no safetensors file."""
    from safetensors import SafetensorError

    if not Path(path).is_file():
        raise ValueError(f"{path} is not a file; a safetensors file was expected there")
    try:
        yield
    except SafetensorError as error:
        raise ValueError(f"{path} is not a safetensors file: {error}") from None


def write_png(path: Path, figure: Any, dpi: int = 120) -> None:
    """Write a figure of matplotlib, atomically."""
    with written_aside(path) as aside:
        figure.savefig(aside, dpi=dpi, format="png")


def read_text(path: str | Path) -> str:
    """Read a text file. Raises ValueError if it is not UTF-8."""
    try:
        return Path(path).read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise ValueError(f"{path} is not a text file: byte {error.start} is not UTF-8") from None


def named_folder(variable: str) -> Path | None:
    """Return the folder that an environment variable names; None if it is not set, or empty.

    It stays the same if the process changes its working directory. Raises ValueError if it is in the home folder of a
    user whose home folder is not known.
    """
    given = os.environ.get(variable)
    try:
        return _first_seen(given) if given else None
    except RuntimeError:
        raise ValueError(f"{variable} is {given!r}, and that home folder is not known; give a whole path") from None


@cache
def _first_seen(given: str) -> Path:
    return Path(given).expanduser().absolute()


def sha256(path: Path) -> str:
    """Return the SHA-256 digest of a file, in hexadecimal digits."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


@contextmanager
def locked(path: Path) -> Iterator[None]:
    """Hold an exclusive lock on the file ``path`` within the block; the file is created if it is missing.

    The block may replace the file; processes that waited for the old one then wait for the new one. The system
    releases the lock when the process ends.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    while True:
        with path.open("ab") as file:  # NFS locks only files that are open for writing
            fcntl.flock(file, fcntl.LOCK_EX)
            if _is_at(path, file):
                yield
                return


def _is_at(path: Path, file: IO[bytes]) -> bool:
    """Return whether an open file is still at ``path``; a holder of its lock may have removed it meanwhile."""
    return path.exists() and os.path.samestat(os.fstat(file.fileno()), path.stat())


@contextmanager
def locked_alone(path: Path, taken: str) -> Iterator[None]:
    """Hold an exclusive lock on the file ``path``, which exists as long as the block runs.

    Missing parent folders are created, and removed again after the block if they are empty. Raises ValueError with the
    message ``taken`` if another process holds the lock.
    """
    missing = [folder for folder in path.parents if not folder.exists()]  # deepest first
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("ab") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise ValueError(taken) from None
        except OSError:  # the file system has no locks
            pass
        if not _is_at(path, file):
            raise ValueError(taken)
        try:
            yield
        finally:
            path.unlink(missing_ok=True)
            for each in missing:
                with suppress(OSError):  # rmdir fails for a folder that is not empty, which is to stay
                    each.rmdir()


def require_writable(*paths: Path) -> None:
    """Check, before long work, that its results can be written to ``paths``. No file or folder is created.

    Raises:
        OSError: if a file cannot be written; the message names the path.
        ValueError: if two of the paths are the same file, or a path exists and is not a file.
    """
    for path in paths:
        if os.path.lexists(path) and not path.is_file():
            raise ValueError(f"{path} is {'a folder' if path.is_dir() else 'not a regular file'}; it must be a file")
        if [os.path.realpath(other) for other in paths].count(os.path.realpath(path)) > 1:
            raise ValueError(f"{path} is given for two files; each file needs a path of its own")
        folder = next(folder for folder in path.absolute().parents if os.path.lexists(folder))
        try:
            if path.is_file():
                path.open("ab").close()
            tempfile.TemporaryFile(dir=folder).close()
        except OSError as error:
            raise OSError(f"{path} cannot be written: {error.strerror}") from None
