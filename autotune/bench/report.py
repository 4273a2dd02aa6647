"""The results of a run as tables on the terminal, as Markdown, as JSON, and as a picture."""

from __future__ import annotations

import json
import platform
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from datetime import UTC, datetime
from pathlib import Path

import rich.table
import torch
from rich.console import Console
from rich.text import Text

from autotune.bench.goal import Goal
from autotune.bench.run import FLOOR, Row, Table
from lowering.targets import cpu_name
from ramnet.console import digits, duration
from ramnet.files import write_png, write_text_atomic
from ramnet.markdown import markdown_table


@dataclass(frozen=True)
class Report:
    """Everything that one run measured."""

    tables: list[Table]
    goals: list[Goal]
    facts: dict[str, float]
    notices: list[str]
    machine: dict[str, str | int] = field(default_factory=lambda: machine())

    def to_json(self) -> str:
        """The report as JSON, times in seconds."""
        goals = [{**asdict(goal), "verdict": goal.verdict} for goal in self.goals]
        return json.dumps({**asdict(self), "goals": goals}, indent=1, ensure_ascii=False) + "\n"


def machine() -> dict[str, str | int]:
    """Describe the machine, the date and the versions of libraries."""
    return {
        "cpu": cpu_name(), "cores": torch.get_num_threads(), "python": platform.python_version(),
        "torch": torch.__version__, "date": datetime.now(UTC).isoformat(timespec="seconds"),
    }  # fmt: skip


ROW_COLUMNS = ("form", "time", "± IQR", "ratio", "± IQR", "rounds", "calls")
GOAL_COLUMNS = ("what", "goal", "measured", "± IQR", "verdict", "note")


def row_cells(row: Row, base: str) -> tuple[str, ...]:
    """A row as text, in the order of ``ROW_COLUMNS``."""
    ratio = "1" if row.form == base else f"{digits(row.ratio)}×"
    return (
        row.form, duration(row.seconds), f"{row.spread:.0%}", ratio, f"{row.ratio_spread:.0%}",
        str(row.rounds), str(row.runs),
    )  # fmt: skip


def goal_cells(goal: Goal) -> tuple[str, ...]:
    """A goal as text, in the order of ``GOAL_COLUMNS``."""
    measured = "" if goal.measured is None else digits(goal.measured)
    spread = "" if goal.spread is None else f"{goal.spread:.0%}"
    return goal.name, f"{'≥' if goal.at_least else '≤'} {goal.bound:g}", measured, spread, goal.verdict, goal.note


def title(table: Table) -> str:
    """Describe what a table compares, on how many of the host's threads, and its base."""
    if not table.rows:
        return f"{table.name}: {table.what}"
    threads = f"{table.threads} thread{'s'[: table.threads > 1]}"
    return f"{table.name}: {table.what}, {threads}; ratios are over {table.base}"


def show(report: Report, console: Console) -> None:
    """Print the tables, the goals and the notices."""
    for table in report.tables:
        shown = rich.table.Table(title=title(table), title_justify="left", title_style="bold")
        shown.add_column("form", no_wrap=True)
        for column in ROW_COLUMNS[1:]:
            shown.add_column(column, justify="right")
        for row in table.rows:
            shown.add_row(*row_cells(row, table.base))
        for form, why in table.failed.items():
            shown.add_row(Text(form), Text(why))
        console.print(shown)
    goals = rich.table.Table(title="goals", title_justify="left", title_style="bold")
    for column in GOAL_COLUMNS:
        goals.add_column(column)
    for goal in report.goals:
        goals.add_row(*map(Text, goal_cells(goal)))
    console.print(goals)
    for name, value in report.facts.items():
        console.print(f"{name}: {value:.3g}")
    for notice in report.notices:
        console.print(f"note: {notice}", markup=False)


def markdown(report: Report) -> str:
    """The tables, goals, facts and notices as Markdown."""
    parts = ["# Benchmark\n" + "\n".join(f"- {name}: {value}" for name, value in report.machine.items())]
    goals = [goal_cells(goal) for goal in report.goals]
    parts.append("## Goals\n" + _lines(GOAL_COLUMNS, goals))
    for table in report.tables:
        rows = [row_cells(row, table.base) for row in table.rows]
        rows += [(form, why, *[""] * 5) for form, why in table.failed.items()]
        parts.append(f"## {title(table)}\n" + _lines(ROW_COLUMNS, rows))
    parts.append("\n".join(f"- {name}: {value:.4g}" for name, value in report.facts.items()))
    parts.append("\n".join(f"- {notice}" for notice in report.notices))
    return "\n\n".join(part for part in parts if part) + "\n"


def _lines(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    return "\n" + markdown_table(head, ([cell.replace("|", "/") for cell in row] for row in rows))


NAMES = ("bench.json", "bench.md", "bench.png")


OURS, THEIRS, LIMIT = "RAM-Net on its kernels", "another form or library", "what moving the bytes takes"
# The colour of each kind of form.
COLOURS = {OURS: "C0", THEIRS: "C1", LIMIT: "0.6"}
_OTHERS = (
    "eager",
    "plain C++",
    "GLA",
    "Gated DeltaNet",
    "flash-linear-attention",
    "FlashAttention",
    "cuDNN",
    "onnxruntime",
    "ExecuTorch",
    "llama.cpp",
    "Mamba-2",
    "RWKV-7",
)


def kind_of(form: str) -> str:
    """Return the kind of a form, a key of ``COLOURS``."""
    if form.startswith(FLOOR):
        return LIMIT
    return THEIRS if form.startswith(_OTHERS) else OURS


def save(report: Report, directory: Path) -> list[Path]:
    """Write the files of ``NAMES`` atomically, the last if matplotlib is installed, and return their paths."""
    *paths, picture = (directory / name for name in NAMES)
    write_text_atomic(paths[0], report.to_json())
    write_text_atomic(paths[1], markdown(report))
    try:
        from matplotlib.figure import Figure
        from matplotlib.patches import Patch
        from matplotlib.ticker import EngFormatter
    except ImportError:
        missing = "no picture: matplotlib is not installed; pip install 'ramnet[tune]'"
        if missing not in report.notices:
            report.notices.append(missing)
        return paths
    tables = [table for table in report.tables if table.rows]
    columns = 2
    lines = max(1, -(-len(tables) // columns))
    figure = Figure(figsize=(14, 1 + 2.6 * lines), layout="constrained")
    for place, table in enumerate(tables, start=1):
        axes = figure.add_subplot(lines, columns, place)
        forms = [row.form for row in table.rows]
        seconds = [row.seconds for row in table.rows]
        # An error bar as long as the interquartile range.
        errors = [row.seconds * row.spread / 2 for row in table.rows]
        colours = [COLOURS[kind_of(form)] for form in forms]
        bars = axes.barh(forms, seconds, xerr=errors, color=colours, ecolor="0.2", capsize=2)
        axes.bar_label(bars, [f" {duration(x)}" for x in seconds], fontsize=8)
        # A bar from 0 says most, as long as the shortest can still be seen.
        if max(seconds) > 20 * min(seconds):
            axes.set_xscale("log")
            axes.set_xlim(min(seconds) / 3, max(seconds) * 10)
        else:
            axes.set_xlim(0, max(seconds) * 1.2)
        axes.xaxis.set_major_formatter(EngFormatter("s"))
        axes.invert_yaxis()
        axes.set_title(f"{table.name}: time a call\n{table.what}", fontsize=9)
        axes.tick_params(labelsize=8)
    patches = [Patch(color=colour, label=kind) for kind, colour in COLOURS.items()]
    figure.legend(handles=patches, loc="outside lower center", ncols=len(patches), fontsize=8)
    write_png(picture, figure)
    return [*paths, picture]
