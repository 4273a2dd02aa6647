"""The goals against other models and runtimes, and their measured values."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from autotune.bench.goal import Goal
from autotune.bench.peers import parts
from autotune.bench.peers.llama import LLAMA
from autotune.bench.run import Row, Table

_DECODE = {"float32": (1.1, 1.8, 5), "int8": (1.3, 2.5, 10)}
_ONNX = {4096: 2, 32_768: 10}


def goals(tables: Mapping[str, Table]) -> list[Goal]:
    """Return all goals with their measurements in ``tables``, which are by name."""
    found = []
    for precision, bounds in _DECODE.items():
        table = tables.get(f"decode {precision}")
        for tokens, bound in zip(parts.LENGTHS, bounds, strict=True):
            name = f"decode after {tokens} tokens, {precision}, over llama.cpp's Llama"
            theirs, ours = parts.after(LLAMA, tokens), parts.after(parts.library(precision), tokens)
            found.append(_goal(name, bound, table, [theirs], [ours]))
    for sequences in (1, parts.SEQUENCES):
        for peer in parts.RECURRENT.values():
            name = f"decode of {sequences} at once, int8, over llama.cpp's {peer}"
            table = tables.get(f"recurrent {sequences}")
            found.append(_goal(name, 1.2, table, [f"{peer}, {LLAMA}"], [parts.library("int8")]))
    for tokens, bound in _ONNX.items():
        name = f"decode after {tokens} tokens, float32, over the Transformer in onnxruntime"
        ours = parts.after(parts.library("float32"), tokens)
        found.append(_goal(name, bound, tables.get("decode onnx"), [parts.after(parts.ONNX, tokens)], [ours]))
    table = tables.get("prefill")
    forms = [row.form for row in table.rows] if table else []
    theirs_of, ours_of = ([form for form in forms if form.startswith(LLAMA) is peers] for peers in (True, False))
    found.append(_goal(f"prefill of {parts.PROMPT} tokens over llama.cpp's Llama", 1.5, table, theirs_of, ours_of))
    return found


def _goal(name: str, bound: float, table: Table | None, theirs: Sequence[str], ours: Sequence[str]) -> Goal:
    """Return a goal for the time of the quickest of their forms over that of the quickest of ours."""
    their, our = _quickest(table, theirs), _quickest(table, ours)
    measured = table.ratio(their.form, our.form) if table and their and our else None
    if not their or not our or not measured:
        return Goal(name, bound, True, None, None)
    return Goal(name, bound, True, *measured, f"{our.form} over {their.form}")


def _quickest(table: Table | None, forms: Sequence[str]) -> Row | None:
    rows = [row for form in forms if table and (row := table.row(form))]
    return min(rows, key=lambda row: row.ratio, default=None)
