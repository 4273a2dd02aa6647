"""A small RAM-Net, and the same one as a model of transformers."""

from __future__ import annotations

from typing import Any

from ramnet import RamNetForCausalLM
from ramnet.hf import HFRamNetForCausalLM
from tests.ramnet.test_model import small_model


def both(**changes: Any) -> tuple[RamNetForCausalLM, HFRamNetForCausalLM]:
    """Return a model and the model for transformers of the same weights, which it does not share."""
    return small_model(**changes), HFRamNetForCausalLM.of(small_model(**changes))
