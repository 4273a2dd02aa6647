"""The picture of a long text."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

import ramnet
from ramnet import RamNetForCausalLM
from ramnet.tracing import picture
from ramnet.tracing.heads import heads_of
from tests.ramnet.tracing.conftest import CONFIG

pytest.importorskip("matplotlib", reason="the picture needs matplotlib: pip install 'ramnet[tune]'")


def test_a_long_text_is_drawn_as_far_as_its_marks_can_be_told_apart(
    checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    drawn: list[Any] = []
    monkeypatch.setattr("matplotlib.figure.Figure.savefig", lambda figure, path, **_: (
        drawn.append(figure), path.write_bytes(b""),
    ))  # fmt: skip
    monkeypatch.setattr(picture, "MOST_TOKENS", 90)
    trace = ramnet.trace(RamNetForCausalLM.from_pretrained(checkpoint), torch.arange(100).unsqueeze(0))
    (head,) = heads_of(trace, layers=[2], heads=[2])
    picture.save_picture([head], ["x"] * 100, tmp_path / "picture.png")
    over_time, use, ages = drawn[0].axes
    assert over_time.get_xlabel() == "token (the first 90 of 100)"
    read, written = over_time.collections
    assert len(read.get_offsets()) == len(written.get_offsets()) == 90 * CONFIG.top_k
    assert written.get_offsets()[:, 1].tolist() == head.accesses.write_slots[:90].flatten().tolist()
    assert len(use.patches) == 2 * 2**CONFIG.order
    assert ages.lines[0].get_ydata()[-1] == pytest.approx(float(head.ages.sum()), rel=1e-5)
    assert len(ages.lines[0].get_xdata()) == 101, "and an end, so that one token's age is a line, too"
