"""A small checkpoint to trace, and the data in a page."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from ramnet import RamNetConfig, RamNetForCausalLM
from ramnet.files import read_text

# At the temperature 1, the offsets are so sharp that a token reads hardly more than one other.
CONFIG = RamNetConfig(
    vocab_size=256, hidden_size=8, num_layers=2, num_heads=2, value_dim=4, order=3, sub_dim=2, top_k=3,
    cape_full_layers=1, embedding_std=1.0, address_bias="offsets", temperature=1.5,
)  # fmt: skip


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    torch.manual_seed(0)
    folder = tmp_path_factory.mktemp("model")
    RamNetForCausalLM(CONFIG).save_pretrained(folder)
    return folder


def data_of(path: Path) -> dict[str, Any]:
    """Return the data in a page."""
    return json.loads(read_text(path).split('id="data">')[1].split("</script>")[0])
