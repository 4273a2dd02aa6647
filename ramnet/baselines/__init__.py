"""Other sequence mixers in the skeleton of the RAM-Net model, which recall and language modelling are compared with."""

from ramnet.baselines.model import BaselineConfig, BaselineForCausalLM

__all__ = ["BaselineConfig", "BaselineForCausalLM"]
