"""The goals on a CPU and their measured values."""

from __future__ import annotations

from collections.abc import Mapping

from autotune.bench.cpu import onnx, token
from autotune.bench.cpu.language_model import COMPILED, FEW, MANY
from autotune.bench.cpu.ops import LARGE, OPERANDS, SMALL
from autotune.bench.cpu.peak_memory import Peak
from autotune.bench.goal import Goal
from autotune.bench.run import FLOOR, TUNED, Table

# The time of a token over that of reading its weights once, by precision.
_OVER_READING = {"float32": 1.1, "bfloat16": 1.2, "int8": 1.35, "int4": 1.8}


def goals(tables: Mapping[str, Table], peak: Peak | None) -> list[Goal]:
    """Return all goals with their measurements in ``tables``, which are by name."""
    decoded = tables.get("decode 340m")
    quickest = COMPILED if decoded and _ratio(decoded, COMPILED, FLOOR)[0] else TUNED
    rows = [
        (
            "memory_scan, tuned, over eager, in place", 60, True, ("memory_scan", "eager, in place", TUNED),
            _limit(tables.get("memory_scan"), "eager, in place"),
        ),
        (
            "memory_scan, tuned, over eager, chunked", 60, True, ("memory_scan", "eager, chunked", TUNED),
            _limit(tables.get("memory_scan"), "eager, chunked"),
        ),
        ("memory_scan, tuned, over plain C++", 1.3, True, ("memory_scan", "plain C++", TUNED), ""),
        ("memory_scan, tuned, over the floor", 2.4, False, ("memory_scan", TUNED, FLOOR), ""),
        (
            "memory_scan forward + backward over autograd through sort + segmented scan", 20, True,
            ("memory_scan forward + backward", "eager, sorted", TUNED), "",
        ),
        ("address_decode over eager topk beams", 30, True, ("address_decode", "eager, topk beams", TUNED), ""),
        ("memory_step at M = 4^10 over M = 4^5", 1.3, False, ("memory_step by slots", LARGE, SMALL), ""),
        ("decode of 340m over reading its weights", 1.25, False, ("decode 340m", quickest, FLOOR), quickest),
        ("decode after 100 000 tokens over after 10", 1.05, False, ("decode tiny by position", MANY, FEW), ""),
        ("token of tiny in the library over onnxruntime", 6, True, ("token tiny", token.ONNX, token.BASE), ""),
        ("token of tiny in the library over ExecuTorch", 6, True, ("token tiny", token.EXECUTORCH, token.BASE), ""),
        *(
            (
                f"token of 340m in {precision} over reading its weights", bound, False,
                ("token 340m", token.library(precision), token.floor(precision)), "",
            )
            for precision, bound in _OVER_READING.items()
        ),
        ("token of 340m in int8 over float32", 3, True, ("token 340m", token.BASE, token.library("int8")), ""),
        ("ONNX prompt, kernels over standard", 5, True, (onnx.PREFILL, onnx.STANDARD, onnx.KERNELS), ""),
        ("ONNX token, kernels over standard", 1.5, True, (onnx.DECODE, onnx.STANDARD, onnx.KERNELS), ""),
        (
            "ONNX token, kernels, at M = 4^8 over M = 4^5", 1.15, False,
            (onnx.SLOTS, onnx.slots(onnx.MANY), onnx.slots(onnx.FEW)), "",
        ),
    ]  # fmt: skip
    found = [
        Goal(name, bound, at_least, *_ratio(tables.get(table), of, over), note)
        for name, bound, at_least, (table, of, over), note in rows
    ]
    tiny = tables["token tiny"].row(token.BASE) if "token tiny" in tables else None
    time, spread = (tiny.seconds * 1e6, tiny.spread) if tiny else (None, None)
    found.append(Goal("token of tiny in the library, µs", 60, False, time, spread, token.BASE))
    measured = peak.measured / peak.budget if peak else None
    note = f"{peak.measured / 1e6:.1f} of {peak.budget / 1e6:.1f} MB" if peak else ""
    name = "memory of a training step's scan, T = 1024, over inputs, outputs and two rows a pair"
    return [*found, Goal(name, 1.0, False, measured, None, note)]


def _ratio(table: Table | None, of: str, over: str) -> tuple[float | None, float | None]:
    """Return ``Table.ratio``; two None if it was not measured."""
    return (table and table.ratio(of, over)) or (None, None)


def _limit(table: Table | None, form: str) -> str:
    """Describe how many times faster than ``form`` the scan's bandwidth bounds are."""
    if table is None or (slow := table.row(form)) is None:
        return ""
    floors = [(name, table.row(name)) for name in (FLOOR, OPERANDS)]
    return "; ".join(f"{name}: {slow.ratio / row.ratio:.0f}×" for name, row in floors if row is not None)
