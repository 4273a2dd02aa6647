"""The groups of the benchmark, in order."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial
from time import perf_counter
from typing import Any

from autotune.bench import correlation
from autotune.bench.cpu import decode_process, language_model, onnx, ops, peak_memory, token
from autotune.bench.cpu.goals import goals
from autotune.bench.report import Report
from autotune.bench.run import Run, Table
from ramnet.config import RamNetConfig
from schedules.of_model import of_model

# The seconds for comparing the time model with measurements, over all ops.
CORRELATION_SECONDS = 180.0


def measure(run: Run, model_threads: int, on_group: Callable[[int, int], None]) -> Iterator[Report]:
    """Yield the report after each group. One that cannot be measured is left out with a notice.

    ``on_group(done, total)`` is called for progress. Raises ValueError if a form has a wrong result.
    """
    model: dict[str, Any] = {"threads": model_threads}
    groups: dict[str, Callable[[Run], Table | list[Table] | None]] = {
        "memory_scan": ops.memory_scan,
        "memory_scan forward + backward": ops.memory_scan_training,
        "address_decode": ops.address_decode,
        "memory_step": ops.memory_step,
        "memory_step by slots": ops.memory_step_slots,
        "training": partial(language_model.training_step, preset="tiny", batch=4, tokens=1024, **model),
        "prefill": partial(language_model.prefill, preset="tiny", batch=4, tokens=1024, **model),
        "decode tiny": partial(language_model.decode, preset="tiny", **model),
        "decode tiny by position": partial(language_model.decode_late, **model),
        "decode 340m": partial(decode_process.decode, preset="340m", **model),
        "token tiny": partial(token.token, preset="tiny", threads=1, tokens=16, others=True, floors=False),
        "token 340m": partial(token.token, preset="340m", tokens=4, others=False, floors=True, **model),
        "ONNX": partial(onnx.tables, threads=1),
    }
    tables: dict[str, Table] = {}
    peaked: peak_memory.Peak | None = None

    def report() -> Report:
        return Report(list(tables.values()), goals(tables, peaked), run.facts, run.notices)

    for done, (name, group) in enumerate(groups.items()):
        on_group(done, len(groups) + 2)
        begin = perf_counter()
        try:
            found = group(run) or []
        except (RuntimeError, OSError, MemoryError) as problem:
            run.notice(f"{name} is left out: {problem}")
            continue
        new = [found] if isinstance(found, Table) else found
        tables |= {table.name: table for table in new}
        if new:
            run.facts[f"seconds that {new[0].name} took"] = perf_counter() - begin
        yield report()
    on_group(len(groups), len(groups) + 2)
    run.on_step("peak memory")
    peaked = _peak(run)
    on_group(len(groups) + 1, len(groups) + 2)
    _correlate(run)
    on_group(len(groups) + 2, len(groups) + 2)
    yield report()


def _correlate(run: Run) -> None:
    if run.quick:
        run.notice(f"{correlation.FACT} left out of a quick run")
    elif run.kernels:
        correlation.add_facts(run, of_model(RamNetConfig.preset("340m")), CORRELATION_SECONDS)


def _peak(run: Run) -> peak_memory.Peak | None:
    if not run.kernels:
        return None
    try:
        return peak_memory.measure_in_process(run.target)
    except RuntimeError as problem:
        run.notice(str(problem))
        return None
