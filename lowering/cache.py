"""The disk cache of compiled kernels: a folder that only the user can access, with a SHA-256 digest beside each file.

Cached code runs with the user's rights. So a folder that others could write to is not used, and a file that does not
match its digest is compiled again. If the cache cannot be used, kernels are compiled in each process.
"""

from __future__ import annotations

import json
import os
import stat
import warnings
from collections.abc import Callable
from functools import cache
from pathlib import Path

from ramnet.files import clear_asides, named_folder, sha256, write_text_atomic, written_aside

COMPILERS = "compilers.json"


def find(name: str) -> Path | None:
    """Return the path of the cached file, or None if it is missing or does not match its digest."""
    folder = _usable()
    if folder is None:
        return None
    try:
        written = _digest_path(folder / name).read_text(encoding="ascii", errors="replace")
        return folder / name if written == sha256(folder / name) else None
    except OSError:
        return None


def keep(name: str, write: Callable[[Path], object]) -> Path | None:
    """Add the file that ``write(path)`` creates to the cache and return its path; None, with a warning, on failure.

    ``write`` may raise OSError or RuntimeError, for example if the disk is full.
    """
    folder = _usable()
    if folder is None:
        return None
    try:
        with written_aside(folder / name) as aside:
            write(aside)
            digest = sha256(aside)
        write_text_atomic(_digest_path(folder / name), digest)
    except (OSError, RuntimeError) as error:
        notice(f"a compiled kernel cannot be kept in {folder}: {error}")
        return None
    return folder / name


def compilers() -> dict[str, str]:
    """Return the versions of the compilers of TIR's binaries in the cache, by package, if it was copied from another
    machine and says so in ``COMPILERS``; else an empty dict."""
    folder = _usable()
    try:
        found = {} if folder is None else json.loads((folder / COMPILERS).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return found if isinstance(found, dict) else {}


@cache
def notice(reason: str) -> None:
    """Warn once why kernels are not cached."""
    warnings.warn(f"{reason}; kernels are compiled anew in each process", stacklevel=4)


def _place() -> Path:
    """Return ``$RAMNET_CACHE/kernels``, or ``ramnet/kernels`` in the user's cache folder."""
    given = named_folder("RAMNET_CACHE")
    return (given or (named_folder("XDG_CACHE_HOME") or Path("~/.cache").expanduser()) / "ramnet") / "kernels"


def _usable() -> Path | None:
    """Return ``_folder`` of ``_place``; None, with a warning, if that is in a home folder that is not known."""
    try:
        place = _place()
    except (RuntimeError, ValueError) as error:
        notice(f"{error}; set RAMNET_CACHE to a folder of your own")
        return None
    found = _folder(place)
    if found is not None and not found.is_dir():  # someone has removed it
        _folder.cache_clear()
        found = _folder(place)
    return found


@cache
def _folder(path: Path) -> Path | None:
    """Create the folder if it is missing, make it private, and remove what killed processes left in it.

    Returns None, with a warning, if it cannot be used.
    """
    try:
        path.mkdir(mode=0o700, parents=True, exist_ok=True)
        found = path.lstat()
        if not stat.S_ISDIR(found.st_mode):
            raise PermissionError(f"{path} is a link")
        if found.st_uid != os.geteuid():
            raise PermissionError(f"{path} belongs to user {found.st_uid}, not to {os.geteuid()}, who runs this")
        if found.st_mode & (stat.S_IWGRP | stat.S_IWOTH):
            raise PermissionError(f"{path} can be written to by others, and its kernels may be theirs")
        if stat.S_IMODE(found.st_mode) != 0o700:
            path.chmod(0o700)
        if os.statvfs(path).f_flag & getattr(os, "ST_NOEXEC", 0):  # Linux has it
            raise PermissionError(f'{path} is on a disk that is mounted as "noexec", from which no code is loaded')
        str(path).encode()
    except UnicodeEncodeError:
        notice(f"{os.fsencode(path)!r} is not UTF-8; set RAMNET_CACHE to a folder of your own")
        return None
    except OSError as error:
        notice(f"{error}; set RAMNET_CACHE to a folder of your own")
        return None
    clear_asides(path)
    return path


def _digest_path(path: Path) -> Path:
    return path.with_name(f"{path.name}.sha256")
