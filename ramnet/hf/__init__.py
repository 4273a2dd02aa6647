"""RAM-Net for Hugging Face transformers. Importing this package registers it with the Auto classes."""

from __future__ import annotations

from importlib.util import find_spec

if find_spec("transformers") is None:
    raise ImportError("ramnet.hf needs transformers: pip install 'ramnet[hf]'")

from transformers import AutoConfig, AutoModelForCausalLM
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

from ramnet.hf.cache import HFRamNetCache
from ramnet.hf.configuration import HFRamNetConfig
from ramnet.hf.convert import convert
from ramnet.hf.modeling import HFRamNetForCausalLM
from ramnet.hf.tokenizer import byte_tokenizer

__all__ = ["HFRamNetCache", "HFRamNetConfig", "HFRamNetForCausalLM", "byte_tokenizer", "convert"]

AutoConfig.register(HFRamNetConfig.model_type, HFRamNetConfig, exist_ok=True)
AutoModelForCausalLM.register(HFRamNetConfig, HFRamNetForCausalLM, exist_ok=True)
# Trainer's label smoothing shifts the labels of the models in this table only.
MODEL_FOR_CAUSAL_LM_MAPPING_NAMES[HFRamNetConfig.model_type] = HFRamNetForCausalLM.__name__
