"""Writes heads of a trace as one HTML page: for each token, whose writes it reads."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from torch import Tensor

from ramnet.files import read_text, write_text_atomic
from ramnet.tracing.heads import HeadTrace

# Numbers in a page. 1000 tokens of "tiny" are 360 000 of them, 1.0 MB; a page of this many has 1.5 MB.
MOST_NUMBERS = 500_000
_FOLDER = Path(__file__).parent / "page"


def tokens_in_page(heads: Sequence[HeadTrace]) -> int:
    """Return of how many tokens a page of ``heads`` can hold the accesses and sources; at least 1."""
    numbers = sum(4 * head.accesses.write_slots.shape[1] + 2 * head.sources.shape[1] + 1 for head in heads)
    return max(1, MOST_NUMBERS // numbers)


def save_page(heads: Sequence[HeadTrace], labels: Sequence[str], path: Path, whole: bool = False) -> None:
    """Write the page atomically. It needs no other file and no network.

    Of a longer text it shows the first ``tokens_in_page`` tokens, and says so.

    Args:
        labels: the text of each token.
        whole: the tokens are words of their own, shown apart, rather than pieces of a text.

    Raises:
        OSError: if ``path`` cannot be written.
    """
    tokens = min(len(labels), tokens_in_page(heads))
    data: dict[str, Any] = {
        "labels": list(labels[:tokens]),
        "whole": whole,
        "heads": [_facts(head, tokens) for head in heads],
        "cut": f"The page shows the first {tokens} of {len(labels)} tokens." if tokens < len(labels) else "",
    }
    # In a script, "</script" and "<!--" would end or change it.
    text = json.dumps(data, ensure_ascii=False, separators=(",", ":")).replace("<", "\\u003c")
    page = read_text(_FOLDER / "index.html")
    for name, file in (("STYLE", "style.css"), ("SCRIPT", "page.js")):
        page = page.replace(f"/*{name}*/", read_text(_FOLDER / file).strip())
    write_text_atomic(path, page.replace("/*DATA*/", text))


def _facts(head: HeadTrace, tokens: int) -> dict[str, Any]:
    """Return what the page shows of a head; weights and shares are in hundredths."""
    write_slots, write_weights, read_slots, read_weights = (x[:tokens] for x in head.accesses)
    return {
        "layer": head.layer, "head": head.head, "moves": head.moves, "slots": len(head.written),
        "topK": write_slots.shape[1], "most": head.sources.shape[1],
        "used": round(100 * head.share_used), "busiest": head.busiest, "age": head.age(),
        "writeSlots": _listed(write_slots), "writeWeights": _hundredths(write_weights),
        "readSlots": _listed(read_slots), "readWeights": _hundredths(read_weights),
        "sources": _listed(head.sources[:tokens]), "shares": _hundredths(head.shares[:tokens]),
        "before": _hundredths(head.before[:tokens]),
    }  # fmt: skip


def _listed(numbers: Tensor) -> list[int]:
    return numbers.flatten().tolist()


def _hundredths(shares: Tensor) -> list[int]:
    return _listed((100 * shares).round().int())
