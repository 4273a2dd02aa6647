"""The examples of docs/huggingface.md run, one after another."""

from __future__ import annotations

import re
import shutil
from pathlib import Path

import pytest

pytest.importorskip("transformers", reason="ramnet.hf needs transformers: pip install 'ramnet[hf]'")

ROOT = Path(__file__).parents[3]


def test_the_examples_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    shutil.copy(ROOT / "README.md", tmp_path)
    monkeypatch.chdir(tmp_path)
    names: dict = {}
    for example in re.findall(r"```python\n(.*?)```", (ROOT / "docs" / "huggingface.md").read_text(), flags=re.DOTALL):
        exec(example, names)
    assert (tmp_path / "runs" / "own" / "model.safetensors").is_file()
