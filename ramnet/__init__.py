"""RAM-Net: a sequence model whose layers read and write a huge memory through sparse addresses."""

from typing import TYPE_CHECKING

from ramnet.lazy import attributes

if TYPE_CHECKING:
    from collections.abc import Callable
    from contextlib import AbstractContextManager
    from typing import Any

    from ramnet import ops
    from ramnet.config import RamNetConfig
    from ramnet.layer import RamLayer, RamLayerOutput
    from ramnet.model import RamNetForCausalLM, RamNetOutput
    from ramnet.sequences import Sequences
    from ramnet.state import RamState
    from ramnet.tracing.record import trace

    compile: Callable[..., RamNetForCausalLM]  # defined in lowering
    use: Callable[..., AbstractContextManager[None]]  # defined in lowering
    export_onnx: Callable[..., list[Any]]  # defined in export.onnx.build
    tune: Callable[..., list[Any]]  # defined in autotune.call

__all__ = [
    "RamLayer", "RamLayerOutput", "RamNetConfig", "RamNetForCausalLM", "RamNetOutput", "RamState", "Sequences",
    "compile", "export_onnx", "ops", "trace", "tune", "use",
]  # fmt: skip
__version__ = "0.1.0"

# Names are imported on first use, so that the command line does not have to import torch.
__getattr__, __dir__ = attributes(
    __name__,
    {
        "RamLayer": "ramnet.layer",
        "RamLayerOutput": "ramnet.layer",
        "RamNetConfig": "ramnet.config",
        "RamNetForCausalLM": "ramnet.model",
        "RamNetOutput": "ramnet.model",
        "RamState": "ramnet.state",
        "Sequences": "ramnet.sequences",
        "compile": "ramnet.functions",
        "export_onnx": "ramnet.functions",
        "trace": "ramnet.tracing.record",
        "tune": "ramnet.functions",
        "use": "ramnet.functions",
    },
)
