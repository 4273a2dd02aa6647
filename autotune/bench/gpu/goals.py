"""The goals on a GPU and their measured values."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from autotune.bench.correlation import FACT
from autotune.bench.goal import Goal
from autotune.bench.gpu import decode_step, scan, smoke, training
from autotune.bench.run import FLOOR, TUNED, Row, Table

# The scan is to be faster than attention from this length on.
FROM = 8192
DECODED, PLACED = f"{decode_step.NAME} 340m", f"{decode_step.LATE_NAME} 340m"
TRAINED = f"{training.NAME} 340m"


def goals(tables: Mapping[str, Table], facts: Mapping[str, float]) -> list[Goal]:
    """Return all goals with their measurements in ``tables``, which are by name, and ``facts``."""
    scanned, trained = tables.get(scan.NAME), tables.get(TRAINED)
    beside_gla = tables.get(scan.GLA_NAME)
    peers = [name + how for name in (decode_step.GLA, decode_step.DELTA) for how in ("", decode_step.COMPILED)]
    found = [
        _at_most("memory_scan forward + backward, tuned, over chunk_gla", 1.0, beside_gla, [scan.GLA], inverse=True),
        _from_length(tables),
        _at_most("memory_scan forward + backward, tuned, over the floor", 4.0, scanned, [FLOOR], inverse=True),
        _at_least("memory_scan forward + backward over the quickest eager form", 200.0, scanned,
                  [scan.CHUNKED, scan.SORTED]),
        *(
            _at_least(f"decode tokens/s, 340m, batch 64, over {name}", 2.0, tables.get(DECODED),
                      [form for form in peers if form.startswith(name)])
            for name in (decode_step.GLA, decode_step.DELTA)
        ),
        _at_most("decode at 1 M tokens of context over at 1 k", 1.03, tables.get(PLACED),
                 [decode_step.position(decode_step.MANY)], inverse=False),
        _at_least("training step tokens/s, 340m, 65 k tokens, over GLA layers", 1.0, trained, [training.GLA]),
    ]  # fmt: skip
    for name, value in facts.items():
        if name.startswith(FACT):
            found.append(Goal(name, 0.8, True, value, None))
        if name == smoke.DIFFERS:
            found.append(Goal(name, 0, False, value, None))
        if name.startswith("bytes of registers spilled"):
            found.append(Goal(name, 0, False, value, None))
    return found


def _at_least(name: str, bound: float, table: Table | None, forms: Sequence[str]) -> Goal:
    """Return a goal for the shortest of the forms' times divided by that of the base, the kernels."""
    row = _quickest(table, forms)
    if row is None:
        return Goal(name, bound, True, None, None, _why(table, forms))
    return Goal(name, bound, True, row.ratio, row.ratio_spread, row.form)


def _at_most(name: str, bound: float, table: Table | None, forms: Sequence[str], inverse: bool) -> Goal:
    """Return a goal for a form's time divided by the base's or, if ``inverse``, the base's divided by the form's."""
    row = _quickest(table, forms)
    if row is None:
        return Goal(name, bound, False, None, None, _why(table, forms))
    # The median of the inverses is the inverse of the median.
    return Goal(name, bound, False, 1 / row.ratio if inverse else row.ratio, row.ratio_spread, row.form)


def _from_length(tables: Mapping[str, Table]) -> Goal:
    """Return the goal for attention's time divided by the scan's, at the length from ``FROM`` on where it is least."""
    name = f"memory_scan over FlashAttention, forward + backward, T = {FROM} and up"
    lengths = [length for length in scan.LENGTHS if length >= FROM]
    found = [(length, tables.get(f"scan and attention, T = {length}")) for length in lengths]
    rows = [(length, _quickest(table, [scan.FLASH])) for length, table in found]
    known = [(length, row) for length, row in rows if row is not None]
    missing = [str(length) for length, row in rows if row is None]
    if missing:
        note = f"not measured at T = {', '.join(missing)}; {_why(found[0][1], [scan.FLASH])}"
        return Goal(name, 1.0, True, None, None, note)
    length, row = min(known, key=lambda pair: pair[1].ratio)
    return Goal(name, 1.0, True, row.ratio, row.ratio_spread, f"at T = {length}")


def _quickest(table: Table | None, forms: Sequence[str]) -> Row | None:
    """Return the row of the fastest of ``forms``; None if they were not timed together with the base."""
    bases = {TUNED, decode_step.position(decode_step.FEW)}
    if table is None or table.base not in bases or table.row(table.base) is None:
        return None
    rows = [row for form in forms if (row := table.row(form)) is not None]
    return min(rows, key=lambda row: row.seconds, default=None)


def _why(table: Table | None, forms: Sequence[str]) -> str:
    if table is None:
        return ""
    return "; ".join(why for form, why in table.failed.items() if form in (*forms, TUNED, "all"))
