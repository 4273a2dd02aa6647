"""What a tuning run found: a table for the terminal, and one HTML file with Optuna's pictures."""

from __future__ import annotations

import base64
import io
import warnings
from collections.abc import Callable, Sequence
from html import escape
from pathlib import Path
from typing import Any

from rich import box
from rich.table import Table

from autotune.bench.report import duration
from autotune.study import Study
from autotune.tuner import Result
from ramnet.files import write_text_atomic
from schedules.workload import DYNAMIC_AXES

COLUMNS = (
    "workload", "default", "tuned", "eager", "gain over default", "tuned over eager", "knobs", "trials", "failures",
)  # fmt: skip

# With fewer gains a picture shows chance.
FEWEST_PICTURED = 4

_STYLE = """
body { font: 15px/1.5 system-ui, sans-serif; max-width: 76rem; margin: 2rem auto; padding: 0 1rem; color: #222 }
table { border-collapse: collapse; font-size: 13px }
th, td { border-bottom: 1px solid #ddd; padding: .35rem .7rem; text-align: left; vertical-align: top }
th { background: #f5f5f5 } img { max-width: 49%; vertical-align: top } .scroll { overflow-x: auto }
code { font-size: 12px }
"""


def cells(result: Result) -> tuple[str, ...]:
    """A result as text, in the order of ``COLUMNS``."""
    record = result.record
    knobs = " ".join(f"{name}={value}" for name, value in record.knobs.items())
    failures = result.study.summary().failures
    return (
        record.workload.name,
        duration(record.default.median),
        duration(record.tuned.median),
        duration(record.eager.median),
        "no gain" if result.is_default else f"{record.gain:.2f}× ± {record.gain_spread:.2f}",
        f"{result.over_eager[0]:.3g}× ± {result.over_eager[1]:.2g}",
        f"{knobs} (default)" if result.is_default else knobs,
        str(record.trials),
        ", ".join(f"{count} {status}" for status, count in sorted(failures.items())) or "none",
    )


def table(results: Sequence[Result]) -> Table:
    """Compiled against eager, for a terminal of 80 columns."""
    shown = Table(
        title="tuned kernels against eager PyTorch, a call", title_justify="left", title_style="bold",
        box=box.SIMPLE_HEAD,
    )  # fmt: skip
    shown.add_column("op", no_wrap=True)
    for name in ("default", "tuned", "eager", "gain", "over eager", "trials"):
        shown.add_column(name, justify="right", no_wrap=name != "over eager")
    for result in results:
        _, default, tuned, eager, gain, over_eager, _, trials, _ = cells(result)
        workload, failures = result.record.workload, sum(result.study.summary().failures.values())
        op, backward, _ = workload.op.partition("_backward")
        sizes = " ".join(f"{axis}={size}" for axis, size in workload.shape.items() if axis in DYNAMIC_AXES)
        shown.add_row(
            f"{op}{' backward' * bool(backward)}\n  {sizes}", default, tuned, eager, gain.replace(" ± ", "\n± "),
            over_eager.replace(" ± ", "\n± "), f"{trials}\n{failures} failed" if failures else trials,
        )  # fmt: skip
    return shown


def write(results: Sequence[Result], path: Path) -> None:
    """Write the HTML file, whole or not at all. ImportError, with the install line, without matplotlib."""
    try:
        import matplotlib as mpl
    except ImportError:
        raise ImportError("the report needs matplotlib, which is not installed: pip install 'ramnet[tune]'") from None
    mpl.use("Agg")
    first = results[0].record
    head = "".join(f"<th>{escape(name)}</th>" for name in COLUMNS)
    rows = "".join("<tr>" + "".join(f"<td>{escape(cell)}</td>" for cell in cells(r)) + "</tr>\n" for r in results)
    versions = ", ".join(f"{name} {version}" for name, version in first.versions.items())
    write_text_atomic(
        path,
        f"""<!doctype html>
<html lang="en"><meta charset="utf-8"><title>RAM-Net tuned for {escape(first.target)}</title>
<style>{_STYLE}</style>
<h1>RAM-Net tuned for {escape(first.target)}</h1>
<p>{escape(first.device)}; {escape(versions)}; kernels {escape(first.fingerprint)}; {escape(first.date)}.</p>
<p>Times are medians of interleaved rounds, ratios are medians of the rounds' ratios, ± is the interquartile range.
Eager is the plain PyTorch reference. The default stays (“no gain”) unless a finalist was faster in three of four
paired rounds.</p>
<div class="scroll"><table><tr>{head}</tr>
{rows}</table></div>
{"".join(_section(result) for result in results)}
</html>
""",
    )


def _section(result: Result) -> str:
    from optuna.visualization import matplotlib as pictures

    study, summary = result.study, result.study.summary()
    drawn = ""
    if summary.statuses.get("ok", 0) < FEWEST_PICTURED:
        drawn = f"<p>No pictures: fewer than {FEWEST_PICTURED} schedules ran.</p>"
    else:
        drawn += _picture(
            "Gain over the default, by trial",
            lambda: pictures.plot_optimization_history(study.optuna, target_name="gain"),
        )
        drawn += _picture("Importance of the knobs", lambda: pictures.plot_param_importances(study.optuna))
    return f"<h2>{escape(result.record.workload.name)}</h2>\n{drawn}\n{_failures(study)}"


def _failures(study: Study) -> str:
    """Each failed, refused or interrupted trial with its reason."""
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
    """The plot as an image within the page; a sentence where Optuna cannot draw one."""
    from matplotlib import pyplot

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # Optuna's pictures are marked experimental
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
