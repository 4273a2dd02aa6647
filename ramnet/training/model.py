"""The models that can be trained."""

from __future__ import annotations

from ramnet.baselines import BaselineConfig, BaselineForCausalLM
from ramnet.config import RamNetConfig
from ramnet.model import RamNetForCausalLM

Config = RamNetConfig | BaselineConfig
Model = RamNetForCausalLM | BaselineForCausalLM


def make(config: Config) -> Model:
    """Return the untrained model of a configuration."""
    return RamNetForCausalLM(config) if isinstance(config, RamNetConfig) else BaselineForCausalLM(config)
