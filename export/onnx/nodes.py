"""A RAM-Net layer between its projections as one ONNX node of the domain "ramnet", which runs in
``export/onnx/nodes.c``.

The memory and the mass go from the graph's input to the node and from there to the output, so that a session that binds
a buffer to both gives the node that buffer as input and as output.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from ramnet import RamLayer, RamNetForCausalLM, RamState
from ramnet.layer import RamLayerOutput

DOMAIN = "ramnet"


@contextmanager
def layers_are_nodes(model: RamNetForCausalLM) -> Iterator[None]:
    """Make the layers of ``model`` nodes in graphs that ``torch.onnx.export`` traces within the block."""
    mixers: list[Any] = [block.mixer for block in model.blocks]
    for mixer in mixers:
        mixer.forward = partial(_forward, mixer)
    try:
        yield
    finally:
        for mixer in mixers:
            del mixer.forward


def _forward(layer: RamLayer, x: Tensor, state: RamState, **settings: Any) -> RamLayerOutput:
    c = layer.config
    batch, tokens, _ = x.shape
    memory, mass = state.memory[0], state.mass[0]
    scale = layer.log_scale.exp() / c.temperature
    projected = layer.query_key_value(x)
    if layer.address_bias is not None:
        bias = layer.address_bias.flatten()
        projected = projected + F.pad(bias, (0, projected.shape[-1] - len(bias)))
    output, memory, mass, _ = torch.onnx.ops.symbolic_multi_out(
        f"{DOMAIN}::memory",
        [projected, scale, state.position, memory, mass],
        {
            "num_heads": c.num_heads, "value_dim": c.value_dim, "order": c.order, "sub_dim": c.sub_dim,
            "top_k": c.top_k, "cape_heads": layer.cape_heads, "decay_power": c.decay_power, "eps": c.eps,
        },
        dtypes=[x.dtype, x.dtype, x.dtype, torch.int32],
        shapes=[
            (batch, tokens, c.num_heads * c.value_dim), memory.shape, mass.shape,
            (batch, tokens, 2, c.num_heads, c.top_k),
        ],
        version=1,
    )  # fmt: skip
    return RamLayerOutput(layer.output(output), RamState([memory], [mass], [], state.position))
