"""RAM-Net: a sequence model whose layers read and write a huge memory through sparse addresses."""

from ramnet import ops
from ramnet.config import RamNetConfig
from ramnet.model import RamNetForCausalLM, RamNetOutput
from ramnet.state import RamState

__all__ = ["RamNetConfig", "RamNetForCausalLM", "RamNetOutput", "RamState", "ops"]
__version__ = "0.1.0"
