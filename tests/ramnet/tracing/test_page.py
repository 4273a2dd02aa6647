"""The page in headless Chromium: pointing at a token, or moving to it, shows whose writes it reads."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
from pathlib import Path

import pytest
import torch

import ramnet
from ramnet import RamNetForCausalLM
from ramnet.tracing.cli import byte_labels
from ramnet.tracing.heads import HeadTrace, heads_of
from ramnet.tracing.page import save_page

PACKAGES = Path(__file__).parents[3] / "build" / "node_modules"
CHROMIUM = shutil.which("chromium")
TEXT = b"The text\nof <b>23</b> tokens."
TOKEN = 20


def rows(head: HeadTrace, token: int) -> list[tuple[str, str]]:
    """The ages and shares that the page is to show of the tokens that ``token`` reads."""
    found = zip(head.sources[token].tolist(), head.shares[token].tolist(), strict=True)
    return [(str(token - s) if s < token else "itself", f"{100 * share:.0f}%") for s, share in found if share >= 0.005]


@pytest.mark.skipif(CHROMIUM is None, reason="chromium is not installed")
@pytest.mark.skipif(
    not (PACKAGES / "playwright-core").is_dir(),
    reason="playwright-core is not installed: npm install --prefix build playwright-core",
)
def test_a_tokens_sources_are_shown_when_it_is_pointed_at_or_moved_to(checkpoint: Path, tmp_path: Path) -> None:
    trace = ramnet.trace(RamNetForCausalLM.from_pretrained(checkpoint), torch.tensor([list(TEXT)]))
    heads = heads_of(trace)
    save_page(heads, byte_labels(TEXT), tmp_path / "trace.html")
    done = subprocess.run(
        ["node", Path(__file__).with_name("browser.mjs"), tmp_path / "trace.html", PACKAGES, str(TOKEN)],
        capture_output=True, text=True, env={**os.environ, "CHROMIUM": str(CHROMIUM)},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    assert found["errors"] == [] and len(found["asked"]) == 1
    assert found["title"] == "What the memory holds"
    assert found["heads"][::3] == ["Layer 1, head 1: addresses move (CAPE)", "Layer 2, head 2: addresses stay"]
    for name, head, token in (("hovered", 0, TOKEN), ("moved", 0, TOKEN - 1), ("other", 1, TOKEN - 1)):
        shown, exact = found[name], rows(heads[head], token)
        assert len(exact) > 2 and shown["selected"] == f"token-{token}"
        assert [tuple(row[1:]) for row in shown["rows"][: len(exact)]] == exact
        assert shown["marked"] == sorted(heads[head].sources[token][: len(exact)].tolist())
        assert shown["written"].startswith(f"{int(heads[head].accesses.write_slots[token, 0])} (")
    assert found["pointed"] == "token-0"
    assert {"31 157 85", "163 16 26"} & set(found["light"]) and {"111 221 139", "240 82 74"} & set(found["dark"])
    assert not set(found["light"]) & set(found["dark"])
