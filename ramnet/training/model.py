"""The models that can be trained."""

from __future__ import annotations

import torch

from ramnet.baselines import BaselineConfig, BaselineForCausalLM
from ramnet.config import RamNetConfig
from ramnet.model import RamNetForCausalLM
from ramnet.state import RamState

Config = RamNetConfig | BaselineConfig
Model = RamNetForCausalLM | BaselineForCausalLM


def make(config: Config) -> Model:
    """Return the untrained model of a configuration."""
    return RamNetForCausalLM(config) if isinstance(config, RamNetConfig) else BaselineForCausalLM(config)


def parameter_count(config: Config) -> int:
    """Return how many parameters a model has, those of a head tied to the embedding counted once."""
    with torch.device("meta"):  # no weights
        return sum(parameter.numel() for parameter in make(config).parameters())


def state_size(config: Config, tokens: int) -> int:
    """Return the numbers that a model keeps of ``tokens`` tokens: memories, masses and last inputs of convolutions."""
    if isinstance(config, BaselineConfig):
        with torch.device("meta"):
            return BaselineForCausalLM(config).state_size(tokens)
    state = RamState.zeros(config, 1, device="meta")
    return sum(x.numel() for x in (*state.memory, *state.mass, *state.conv))
