"""The parts of ``ramnet bench --peers`` in order."""

from __future__ import annotations

import shutil
import subprocess
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from time import perf_counter

from autotune.bench.peers.goals import goals
from autotune.bench.peers.parts import PARTS, Place
from autotune.bench.report import Report
from autotune.bench.run import Run, Table

# The weights of the largest part, in float32: llama.cpp's or onnxruntime's, and ours.
_BYTES = 4_000_000_000


def interpreter(path: str) -> str:
    """Return the interpreter at ``path``, which may be a virtual environment's folder.

    Raises ValueError if there is none.
    """
    found = Path(path) / "bin" / "python" if Path(path).is_dir() else Path(path)
    try:
        subprocess.run([found, "-c", "import json"], check=True, capture_output=True)
    except (OSError, subprocess.CalledProcessError):
        raise ValueError(f"--peers is {path!r}, which is neither a Python interpreter nor its environment") from None
    return str(found)


def check(parts: Sequence[str], folder: Path) -> None:
    """Raise ValueError, listing the known parts, for an unknown one, and OSError if the disk is too small."""
    unknown = [part for part in parts if part not in PARTS]
    if unknown:
        raise ValueError(f"part {unknown[0]!r} is unknown; with --peers, there are {', '.join(PARTS)}")
    folder.mkdir(parents=True, exist_ok=True)
    free = shutil.disk_usage(folder).free
    if free < _BYTES:
        raise OSError(f"{folder} has {free / 1e9:.1f} GB free; the peers' weights need {_BYTES / 1e9:.0f}")


def measure(
    run: Run, place: Place, parts: Sequence[str], on_part: Callable[[int, int], None]
) -> Iterator[Report]:  # fmt: skip
    """Yield a report after each of ``parts``, or of all. A part that fails becomes a table with the reason."""
    tables: dict[str, Table] = {}
    names = parts or list(PARTS)
    for done, part in enumerate(names):
        on_part(done, len(names))
        begin = perf_counter()
        try:
            found = PARTS[part](run, place)
        except (RuntimeError, ValueError, OSError, MemoryError) as problem:
            found = [Table(part, "the whole part", place.threads, "", [], {"all": f"{problem}"})]
        run.facts[f"seconds that {part} took"] = perf_counter() - begin
        tables |= {table.name: table for table in found}
        on_part(done + 1, len(names))
        yield Report(list(tables.values()), goals(tables), run.facts, run.notices)
