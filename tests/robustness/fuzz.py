"""Mutates user input at random: it must be refused in one sentence or give right results.

    python -m tests.robustness.fuzz --seconds 60 --seed 1

``KINDS`` has a case for each kind of input. A case makes a good one in a folder, changes it at random and uses it. What
must hold, whatever the change: no exception but those that the command line turns into one line, and that in one line;
no file outside the folder; at most ``SECONDS`` of the processor and ``BYTES`` of memory.
"""

from __future__ import annotations

import json
import math
import random
import re
import shutil
import signal
import tempfile
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import click

SECONDS = 5
BYTES = 1 << 30
# The exceptions that ``ramnet.cli.main`` prints in one line.
SENTENCES = (ValueError, TypeError, OSError, RuntimeError, ImportError, click.ClickException)
NUMBERS = (
    0, 1, -1, 2, 3, 255, 2**20, 2**31, -(2**31), 2**63, 10**30, 0.5, -0.0, 1e-300, 1e300, math.inf, math.nan,
)  # fmt: skip
OTHERS = (None, True, "", "x", "\u0000", "é" * 300, [], [1], {}, {"x": 1}, [[[]]])


class UnfitError(AssertionError):
    """A mutation broke what must hold."""


def mutate_bytes(data: bytes, chance: random.Random) -> bytes:
    """Truncate, alter, extend, repeat or clear bytes."""
    at, to = sorted(chance.randrange(len(data) + 1) for _ in range(2))
    some = bytes(chance.randrange(256) for _ in range(chance.choice((1, 1, 4, 100))))
    return chance.choice(
        [data[:at], data[at:], data[:at] + some + data[at + len(some) :], data[:at] + some + data[at:],
         data[:at] + data[to:], data + data[at:to], data[:at] + b"\0" * (to - at) + data[to:], b""]
    )  # fmt: skip


def mutate_json(value: Any, chance: random.Random) -> Any:
    """Change one part of a JSON value, at any depth: its value, dtype, name or presence."""
    if isinstance(value, dict) and value and chance.random() < 0.8:
        name = chance.choice(sorted(value))
        rest = {k: v for k, v in value.items() if k != name}
        how = chance.random()
        if how < 0.1:
            return rest
        if how < 0.2:
            return rest | {chance.choice(("x", name.upper(), "")): value[name]}
        return {k: mutate_json(v, chance) if k == name else v for k, v in value.items()}
    if isinstance(value, list) and value and chance.random() < 0.8:
        at = chance.randrange(len(value))
        return [mutate_json(v, chance) if i == at else v for i, v in enumerate(value)][
            : chance.choice((at, at + 1, 99))
        ]
    return chance.choice((*NUMBERS, *NUMBERS, *OTHERS))


def mutate_file(path: Path, chance: random.Random) -> None:
    """As bytes or, where it is JSON or lines of it, in its structure; or its lines in another order and number."""
    data = path.read_bytes()
    if path.suffix in (".json", ".jsonl", ".journal") and chance.random() < 0.7:
        lines = data.splitlines() if path.suffix != ".json" else [data]
        at = chance.randrange(len(lines))
        how = chance.random()
        if len(lines) > 1 and how < 0.1:
            chance.shuffle(lines)
        elif len(lines) > 1 and how < 0.3:
            del lines[at]
        elif how < 0.4:
            lines.insert(chance.randrange(len(lines) + 1), lines[at])
        else:
            lines[at] = json.dumps(mutate_json(json.loads(lines[at]), chance)).encode()
        path.write_bytes(b"\n".join(lines) + b"\n")
    else:
        path.write_bytes(mutate_bytes(data, chance))


def _memory(line: str) -> int:
    """Return the current (VmRSS) or peak (VmHWM) memory of this process in bytes, on Linux."""
    (found,) = re.findall(rf"^{line}:\s+(\d+) kB$", Path("/proc/self/status").read_text(), flags=re.MULTILINE)
    return int(found) << 10


def _begin_of_peak() -> int:
    """Reset the peak of memory and return the current bytes."""
    Path("/proc/self/clear_refs").write_text("5")
    return _memory("VmRSS")


@contextmanager
def held() -> Iterator[None]:
    """Check, around the block, what must hold for any use of an input."""

    def late(*_: object) -> None:
        raise UnfitError(f"it took more than {SECONDS} s")

    before = [(number, signal.signal(number, late)) for number in (signal.SIGPROF, signal.SIGALRM)]
    signal.setitimer(signal.ITIMER_PROF, SECONDS)
    signal.alarm(60 * SECONDS)  # wall-clock limit for calls that block, generous for a busy machine
    before_bytes = _begin_of_peak()
    try:
        yield
    except SENTENCES as error:
        told = error.format_message() if isinstance(error, click.ClickException) else str(error)
        if "\n" in told.strip() or not told.strip() or len(told) > 2000:
            raise UnfitError(f"{type(error).__name__} is no sentence: {told[:500]!r}") from error
    finally:
        signal.setitimer(signal.ITIMER_PROF, 0)
        signal.alarm(0)
        for number, handler in before:
            signal.signal(number, handler)
    grown = _memory("VmHWM") - before_bytes
    if grown > BYTES:
        raise UnfitError(f"it took {grown >> 20} MB")


class Case:
    """A kind of input. ``make`` creates a valid one, once; ``mutate`` and ``use`` work on copies of it."""

    def make(self, folder: Path) -> None:
        """Write a valid input to an empty folder, and do what is needed only once."""

    def mutate(self, folder: Path, chance: random.Random) -> Any:
        """Change the input; the result is passed to ``use``."""
        mutate_file(chance.choice(sorted(path for path in folder.rglob("*") if path.is_file())), chance)

    def use(self, folder: Path, changed: Any) -> None:
        """Use the input as a user does. Raises AssertionError for wrong results."""
        raise NotImplementedError


def run(case: Case, seed: int, mutations: int | None = None, seconds: float | None = None) -> int:
    """So many mutations of one case, or for so long; how many. UnfitError, with the mutation's number, for what must
    not be."""
    done = 0
    with tempfile.TemporaryDirectory() as place:
        good, used = Path(place) / "good", Path(place) / "in" / "used"
        good.mkdir()
        case.make(good)
        if any(good.iterdir()):  # check the valid input first, which also compiles kernels
            shutil.copytree(good, used)
            case.use(used, None)
            shutil.rmtree(used.parent)
        begun = time.monotonic()
        while done < (mutations or math.inf) and time.monotonic() - begun < (seconds or math.inf):
            used.parent.mkdir()
            shutil.copytree(good, used)
            chance = random.Random(f"{type(case).__name__} {seed} {done}")
            try:
                changed = case.mutate(used, chance)
                with held():
                    case.use(used, changed)
                if [path.name for path in used.parent.iterdir()] != ["used"]:
                    raise UnfitError(f"it left {sorted(path.name for path in used.parent.iterdir())}")
            except Exception as error:
                raise UnfitError(f"{type(case).__name__}, seed {seed}, mutation {done}: {error!r}") from error
            shutil.rmtree(used.parent)
            done += 1
    return done


@click.command()
@click.option("--seconds", default=60.0, show_default=True, help="Of the run, shared out to the kinds.")
@click.option("--seed", default=0, show_default=True)
@click.option("--kind", multiple=True, help="Only these.")
def main(seconds: float, seed: int, kind: tuple[str, ...]) -> None:
    """Mutate inputs at random until the time is over, or a mutation breaks what must hold."""
    from tests.robustness.kinds import KINDS

    chosen = {name: case for name, case in KINDS.items() if not kind or name in kind}
    counts: Counter[str] = Counter()
    for name, case in chosen.items():
        counts[name] = run(case(), seed, seconds=seconds / len(chosen))
        click.echo(f"{name}: {counts[name]} mutations, each refused in a sentence or right")
    click.echo(f"{counts.total()} in all")


if __name__ == "__main__":
    main()
