"""One run of the benchmark: the forms that it compares, their checks and timings, and its results."""

from __future__ import annotations

import importlib.util
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any, Self

import torch
from torch import Tensor

from autotune.measure.bandwidth import Reader, reader
from autotune.measure.timing import Clock, Ratio, interleaved, ratio
from ramnet.ops.backend import Backend, active, registered

Candidate = Callable[[], Any]
DEFAULT, TUNED, FLOOR = "default schedule", "tuned schedule", "floor"


@dataclass(frozen=True)
class Row:
    """One form of an op. ``ratio`` is its time relative to the table's base, the median of ``ratios``, the rounds'."""

    form: str
    seconds: float
    spread: float
    ratio: float
    ratio_spread: float
    rounds: int
    runs: int
    ratios: tuple[float, ...] = ()


@dataclass(frozen=True)
class Table:
    """The forms of one op or model, timed in turn. Ratios are relative to the form ``base``.

    ``failed`` has the reason of each form that was not timed.
    """

    name: str
    what: str
    threads: int
    base: str
    rows: list[Row]
    failed: dict[str, str] = field(default_factory=dict)

    @classmethod
    def from_json(cls, found: Mapping[str, Any]) -> Self:
        """Return the table whose ``dataclasses.asdict`` was written as JSON."""
        rows = [Row(**{**row, "ratios": tuple(row["ratios"])}) for row in found["rows"]]
        return cls(**{**found, "rows": rows})

    def row(self, form: str) -> Row | None:
        """Return the row of that form, or None if it was not run."""
        return next((row for row in self.rows if row.form == form), None)

    def ratio(self, of: str, over: str) -> tuple[float, float] | None:
        """Return the time of one form divided by that of another, and its spread; None if either was not run.

        It is the median of the rounds' ratios, or the ratio of medians, each paired with the base, of forms that were
        timed in different numbers of rounds.
        """
        one, other = self.row(of), self.row(over)
        if one is None or other is None:
            return None
        if len(one.ratios) == len(other.ratios) > 0:
            paired = Ratio(tuple(a / b for a, b in zip(one.ratios, other.ratios, strict=True)))
            return paired.median, paired.spread
        return one.ratio / other.ratio, math.hypot(one.ratio_spread, other.ratio_spread)


@dataclass
class Run:
    """What the groups share. ``on_step`` is called with a description of each step; ``clock`` None is the host's."""

    target: str = "cpu"
    quick: bool = False
    threads: int = 1
    on_step: Callable[[str], None] = lambda what: None
    notices: list[str] = field(default_factory=list)
    facts: dict[str, float] = field(default_factory=dict)
    clock: Clock | None = None

    def notice(self, text: str) -> None:
        """Note once what was left out, and why."""
        if text not in self.notices:
            self.notices.append(text)

    def compiling(self, what: str) -> bool:
        """Return whether to use torch.compile, which takes 7 to 30 s each time; a quick run does not, with a notice."""
        if self.quick:
            self.notice("torch.compile left out of a quick run")
        else:
            self.on_step(f"compiling {what}")
        return not self.quick

    @cached_property
    def kernels(self) -> dict[str, Callable[[], AbstractContextManager[Any]]]:
        """Context managers that run the ops with default and tuned schedules; none, with a notice, without TVM.

        Raises ValueError for an unknown target.
        """
        if importlib.util.find_spec("tvm") is None:
            self.notice("kernels left out: tvm is not installed; pip install 'ramnet[tvm]'")
            return {}
        import lowering

        lowering.find(self.target)
        return {
            DEFAULT: lambda: lowering.use(self.target, tuned=False),
            TUNED: lambda: lowering.use(self.target, tuned=True),
        }

    @cached_property
    def undispatched(self) -> Backend | None:
        """The backend of the tuned kernels, to be called without torch's dispatcher."""
        if not self.kernels:
            return None
        with self.kernels[TUNED]():
            return registered(active())

    @cached_property
    def l2(self) -> Reader:
        """Reads of one core's L2 cache."""
        return self._reader("L2", 1)

    def dram(self, threads: int) -> Reader:
        """Reads of memory by ``threads`` cores."""
        return self._reader("DRAM", threads)

    def _reader(self, level: str, threads: int) -> Reader:
        self.on_step(f"bandwidth of {level}")
        found = reader(level, threads)
        self.facts[f"{level} read bandwidth, threads={threads}, bytes/s"] = found.bandwidth
        if found.how.startswith("torch"):
            self.notice(f"the floor is too high: measured with {found.how}")
        return found

    def on_kernels(self, call: Candidate) -> dict[str, Candidate]:
        """``call`` on the kernels, under the names of the schedules."""

        return {name: within(use, call) for name, use in self.kernels.items()}

    def compare(
        self, name: str, what: str, fast: dict[str, Candidate], slow: dict[str, Candidate] | None = None,
        *, base: str, calls: int = 1, threads: int | None = None, seconds: float = 12.0,
    ) -> Table:  # fmt: skip
        """Time the forms relative to ``base`` (the last of ``fast`` if ``base`` was left out).

        Slow forms are timed separately in few rounds, together with the base. A call of a form is ``calls`` of the op.
        After ``seconds``, a quarter in a quick run, no round begins, except the first three.
        """
        if base not in fast:
            base = [form for form in fast if form != FLOOR][-1]
        rows: list[Row] = []
        groups = [(fast, "", 7 if self.quick else 25, seconds / 4 if self.quick else seconds)]
        if slow:
            groups.append(({**slow, base: fast[base]}, base, 3, 0.0))
        used = threads or self.threads
        with torch_threads(used):
            for forms, listed, rounds, limit in groups:
                self.on_step(f"{name}: {len(forms)} forms in turn")
                timings = interleaved(forms, rounds, limit, clock=self.clock)
                for form, timing in timings.items():
                    if form == listed:
                        continue
                    over = ratio(timings, of=form, over=base)
                    seconds_a_call = timing.median / calls
                    rows.append(Row(form, seconds_a_call, timing.spread, over.median, over.spread, over.rounds,
                                    timing.runs, over.paired))  # fmt: skip
        order = [*(slow or {}), *fast]
        return Table(name, what, used, base, sorted(rows, key=lambda row: order.index(row.form)))


def within(use: Callable[[], AbstractContextManager[Any]], call: Candidate) -> Candidate:
    """Return a function that enters the context ``use()`` and runs ``call`` at every call."""

    def inside() -> Any:
        with use():
            return call()

    return inside


def check(form: str, got: Sequence[Tensor], expected: Sequence[Tensor], tolerance: float = 1e-5) -> None:
    """Raise ValueError if a form's results differ from the reference.

    The error is the root mean square of the differences divided by that of the reference.
    """
    for i, (mine, right) in enumerate(zip(got, expected, strict=True)):
        if mine.shape != right.shape:
            raise ValueError(f"{form} is wrong: its result {i} has shape {list(mine.shape)}, not {list(right.shape)}")
        scale = right.double().square().mean().sqrt().clamp_min(1e-30)
        error = float((mine.double() - right.double()).square().mean().sqrt() / scale)
        if not error <= tolerance:
            raise ValueError(f"{form} is wrong: its result {i} is off by {error:.1e}; {tolerance:.0e} is allowed")


@contextmanager
def torch_threads(count: int) -> Iterator[None]:
    """Set torch's number of threads within the block."""
    before = torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)
