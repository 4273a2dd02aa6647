"""The results of a tuning run: a table for the terminal, and an HTML file with Optuna's plots."""

from __future__ import annotations

import base64
import importlib.util
import io
import warnings
from collections.abc import Callable, Sequence
from html import escape
from pathlib import Path
from typing import Any

from rich import box
from rich.table import Table

from autotune.study.search import Result
from autotune.study.study import Study
from ramnet.console import duration
from ramnet.files import write_text_atomic
from schedules.workload import DYNAMIC_AXES, Workload

COLUMNS = (
    "workload", "default", "tuned", "eager", "gain over default", "tuned over eager", "knobs", "trials", "failures",
)  # fmt: skip
# Of a search in which nothing ran; what binaries need is that of the launch that needs most of it.
MODELLED_COLUMNS = (
    "workload", "default (modelled)", "best (modelled)", "gain (modelled)", "launches", "registers", "spilled bytes",
    "shared bytes", "knobs", "trials", "failures",
)  # fmt: skip

# With fewer gains, a plot would show noise.
FEWEST_PICTURED = 4

TITLE = {"measured": "", "modelled, not run": ": modelled, not run"}
ABOUT = {
    "measured": """Times are medians of interleaved rounds, ratios are medians of the rounds' ratios, ± is the
interquartile range. Eager is the plain PyTorch reference. The default stays (“no gain”) unless a finalist was faster in
three of four paired rounds.""",
    "modelled, not run": """Nothing was run. Every schedule was compiled for the target; registers, spills and shared
memory are those of the binaries, times and gains are what <code>autotune/model/gpu.py</code> makes of them. The
default stays (“no gain”) unless the model sees more than 2 % over it. Schedules that spill registers are refused.""",
}

_STYLE = """
body { font: 15px/1.5 system-ui, sans-serif; max-width: 76rem; margin: 2rem auto; padding: 0 1rem; color: #222 }
table { border-collapse: collapse; font-size: 13px }
th, td { border-bottom: 1px solid #ddd; padding: .35rem .7rem; text-align: left; vertical-align: top }
th { background: #f5f5f5 } img { max-width: 49%; vertical-align: top } .scroll { overflow-x: auto }
code { font-size: 12px }
"""


def cells(result: Result) -> tuple[str, ...]:
    """Return a result as text in the order of ``COLUMNS``, or of ``MODELLED_COLUMNS`` if nothing was run."""
    record = result.record
    knobs = str(record.schedule())
    failures = result.study.summary().failures
    end = (
        f"{knobs} (default)" if result.is_default else knobs,
        str(record.trials),
        ", ".join(f"{count} {status}" for status, count in sorted(failures.items())) or "none",
    )
    tuned = "" if result.is_default else duration(record.tuned.median)  # a schedule has one time
    start = (record.workload.name, duration(record.default.median), tuned)
    if record.how != "measured":
        needs = [max((getattr(x, n) for x in record.launches), default=0) for n in ("registers", "spilled", "shared")]
        gain = "no gain" if result.is_default else f"{record.gain:.2f}×"
        return (*start, gain, str(len(record.launches)), *map(str, needs), *end)
    return (
        *start,
        "" if record.eager is None else duration(record.eager.median),
        "no gain" if result.is_default else f"{record.gain:.2f}× ± {record.gain_spread:.2f}",
        "too slow" if result.over_eager is None else f"{result.over_eager[0]:.3g}× ± {result.over_eager[1]:.2g}",
        *end,
    )


def table(results: Sequence[Result]) -> Table:
    """Return the table of results, measured against eager or modelled, for a terminal of 80 columns."""
    if results[0].record.how == "modelled, not run":
        return _modelled_table(results)
    shown = Table(
        title="tuned kernels against eager PyTorch, a call", title_justify="left", title_style="bold",
        box=box.SIMPLE_HEAD, collapse_padding=True,
    )  # fmt: skip
    shown.add_column("op", no_wrap=True)
    for name in ("default", "tuned", "eager", "gain", "over eager", "trials"):
        shown.add_column(name, justify="right", no_wrap=True)
    for result in results:
        _, default, tuned, eager, gain, over_eager, _, trials, _ = cells(result)
        shown.add_row(
            _op(result), default, tuned, eager, gain.replace(" ± ", "\n± "), over_eager.replace(" ± ", "\n± "),
            _trials(result, trials),
        )  # fmt: skip
    return shown


def _modelled_table(results: Sequence[Result]) -> Table:
    shown = Table(
        title=f"schedules for {results[0].record.target}: compiled; times modelled, not run", title_justify="left",
        title_style="bold", box=box.SIMPLE_HEAD, collapse_padding=True,
    )  # fmt: skip
    shown.add_column("op", no_wrap=True)
    for name in ("default\n(model)", "best\n(model)", "gain\n(model)", "regs", "spilled", "shared", "trials"):
        shown.add_column(name, justify="right", no_wrap=True)
    for result in results:
        _, default, best, gain, _, registers, spilled, shared, _, trials, _ = cells(result)
        shown.add_row(_op(result), default, best, gain, registers, spilled, shared, _trials(result, trials))
    return shown


def notes(results: Sequence[Result], wanted: Sequence[Workload] = ()) -> list[str]:
    """Return notes that are not in the table; ``wanted`` are the workloads that should be tuned."""
    kept = [result.record.workload for result in results if result.kept]
    done = {result.record.workload.name for result in results}
    return [
        *(f"{w.name}: the known record stays, as its schedule could not be compared here" for w in kept),
        *(f"{w.name}: no result, as the time was over" for w in wanted if w.name not in done),
    ]


def chosen(results: Sequence[Result]) -> Table:
    """Return a table of the knobs of the chosen schedules."""
    shown = Table(
        title="schedules chosen", title_justify="left", title_style="bold", box=box.SIMPLE_HEAD, collapse_padding=True
    )
    for name in ("op", "knobs"):
        shown.add_column(name, no_wrap=name == "op")
    for result in results:
        how = " (default)" if result.is_default else ""
        shown.add_row(_op(result).replace("\n  ", " "), f"{result.record.schedule()}{how}")
    return shown


def _op(result: Result) -> str:
    workload = result.record.workload
    op, backward, _ = workload.op.partition("_backward")
    sizes = " ".join(f"{axis}={size}" for axis, size in workload.shape.items() if axis in DYNAMIC_AXES)
    return "\n  ".join([op, *["backward"] * bool(backward), sizes])


def _trials(result: Result, trials: str) -> str:
    failures = sum(result.study.summary().failures.values())
    return f"{trials}\n{failures} failed" if failures else trials


def require_libraries() -> None:
    """Raise ImportError, with the install command, if a library that ``write`` needs is missing."""
    for library, name in (("matplotlib", "matplotlib"), ("sklearn", "scikit-learn")):
        if importlib.util.find_spec(library) is None:
            raise ImportError(f"the report needs {name}, which is not installed: pip install 'ramnet[tune]'")


def write(results: Sequence[Result], path: Path) -> None:
    """Write the HTML file atomically. Raises ImportError as ``require_libraries`` does."""
    require_libraries()
    import matplotlib as mpl

    mpl.use("Agg")
    first = results[0].record
    modelled = first.how == "modelled, not run"
    head = "".join(f"<th>{escape(name)}</th>" for name in (MODELLED_COLUMNS if modelled else COLUMNS))
    rows = "".join("<tr>" + "".join(f"<td>{escape(cell)}</td>" for cell in cells(r)) + "</tr>\n" for r in results)
    versions = ", ".join(f"{name} {version}" for name, version in first.versions.items())
    write_text_atomic(
        path,
        f"""<!doctype html>
<html lang="en"><meta charset="utf-8"><title>RAM-Net tuned for {escape(first.target)}{TITLE[first.how]}</title>
<style>{_STYLE}</style>
<h1>RAM-Net tuned for {escape(first.target)}{TITLE[first.how]}</h1>
<p>{escape(first.device)}; {escape(versions)}; kernels {escape(first.fingerprint)}; {escape(first.date)}.</p>
<p>{ABOUT[first.how]}</p>
<div class="scroll"><table><tr>{head}</tr>
{rows}</table></div>
{"".join(_section(result) for result in results)}
</html>
""",
    )


def _section(result: Result) -> str:
    from optuna.visualization import matplotlib as pictures

    study, summary = result.study, result.study.summary()
    drawn, how = "", TITLE[result.record.how]
    if summary.statuses.get("ok", 0) < FEWEST_PICTURED:
        drawn = f"<p>No pictures: fewer than {FEWEST_PICTURED} schedules came to a gain.</p>"
    else:
        drawn += _picture(
            f"Gain over the default, by trial{how}",
            lambda: pictures.plot_optimization_history(study.optuna, target_name="gain"),
        )
        drawn += _picture(f"Importance of the knobs{how}", lambda: pictures.plot_param_importances(study.optuna))
    return f"<h2>{escape(result.record.workload.name)}</h2>\n{drawn}\n{_failures(study)}"


def _failures(study: Study) -> str:
    """Return each failed, refused or interrupted trial with its reason."""
    rows = [
        f"<tr><td>{trial.number}</td><td>{escape(trial.user_attrs['status'])}</td>"
        f"<td><code>{escape(str(trial.params))}</code></td><td>{escape(trial.user_attrs.get('error', ''))}</td></tr>"
        for trial in study.optuna.get_trials(deepcopy=False)
        if trial.user_attrs.get("status", "ok") not in ("ok", "duplicate")
    ]
    if not rows:
        return "<p>No trial failed.</p>\n"
    head = "<tr><th>trial</th><th>status</th><th>knobs</th><th>reason</th></tr>"
    return f"<details><summary>{len(rows)} failed or refused</summary><table>{head}{''.join(rows)}</table></details>\n"


def _picture(title: str, plot: Callable[[], Any]) -> str:
    """Return the plot as an embedded image, or a sentence if Optuna cannot draw it."""
    from matplotlib import pyplot

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # Optuna's plots are marked experimental
        try:
            axes = plot()
        except (ValueError, RuntimeError) as problem:  # no two gains that differ
            pyplot.close("all")
            return f"<p>{title}: no picture; {escape(str(problem))}</p>"
        axes.set_title("", loc="left")  # where some of optuna's plots put their own
        axes.set_title(title)
        if axes.get_legend() is not None:
            axes.get_legend().remove()
        axes.figure.set_size_inches(7, 4.2)
        data = io.BytesIO()
        axes.figure.savefig(data, format="png", dpi=110, bbox_inches="tight")
        pyplot.close("all")
    return f'<img alt="{title}" src="data:image/png;base64,{base64.b64encode(data.getvalue()).decode()}">\n'
