"""Tables of a GPU's benchmark as a run would have made them."""

from __future__ import annotations

from autotune.bench.gpu import scan
from autotune.bench.run import FLOOR, TUNED, Row, Table


def table(name: str, base: str, times: dict[str, float], **failed: str) -> Table:
    rows = [Row(form, seconds, 0.1, seconds / times[base], 0.2, 7, 70) for form, seconds in times.items()]
    return Table(name, "what", 1, base, rows, failed)


SCAN = table(scan.NAME, TUNED, {TUNED: 2.0, FLOOR: 0.4, scan.CHUNKED: 500.0, scan.SORTED: 300.0})
BESIDE_GLA = table(scan.GLA_NAME, TUNED, {TUNED: 2.0, scan.GLA: 4.0})
