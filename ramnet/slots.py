"""More slots for a trained model, addressed by copies of its own parameters."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ramnet.model import RamNetForCausalLM


def with_more_slots(model: RamNetForCausalLM, layer: int, sub_vectors: int = 1) -> RamNetForCausalLM:
    """Return a copy of ``model`` in which the heads of ``layer`` have M · P^sub_vectors slots.

    To each query and key, copies of its first sub-vectors are appended, with their biases: U becomes U + sub_vectors.
    Nothing is trained, and hooks are not copied. Tokens whose digits are uncertain then spread over more slots, so that
    the writes of different tokens overlap less. States of ``model`` do not fit the new one.

    Args:
        layer: from 0; none of its heads may use CAPE, whose shifts by the slot number would no longer match.
        sub_vectors: from 1 to the layer's order U.

    Raises:
        TypeError: if ``layer`` or ``sub_vectors`` is not an integer, or ``model`` is of another kind.
        ValueError: if an argument is out of range, the larger layer is (``RamNetConfig``), ``model`` has other
            parameters than its configuration says, as with adapters or parametrisations, or its class has a constructor
            of its own.
    """
    for name, value in (("layer", layer), ("sub_vectors", sub_vectors)):
        if isinstance(value, bool) or not isinstance(value, int):
            raise TypeError(f"{name} is {value!r}; it must be an integer")
    if not isinstance(model, RamNetForCausalLM):
        raise TypeError(f"model is a {type(model).__name__}; it must be a RamNetForCausalLM")
    c = model.config
    if not 0 <= layer < c.num_layers:
        raise ValueError(f"layer is {layer}; it must be in 0..{c.num_layers - 1}")
    old = c.layers[layer]
    if c.cape_heads(layer):
        raise ValueError(f"layer {layer} has heads with CAPE, whose reads would miss their writes; choose one without")
    if not 1 <= sub_vectors <= old.order:
        raise ValueError(f"sub_vectors is {sub_vectors}; it must be in 1..{old.order}, the layer's order")
    orders = [each.order for each in c.layers]
    orders[layer] += sub_vectors
    config = c.model_copy(update={"order": tuple(orders)})

    def longer(x: Tensor, *others: int) -> Tensor:
        """Append sub-vectors to ``x``, which is a flattened [2, H, U, P, …]."""
        each = x.view(2, old.num_heads, old.order, old.sub_dim, *others)
        return torch.cat([each, each[:, :, :sub_vectors]], dim=2)

    # Of what lowering.compile returned, the class of its model.
    original = getattr(model, "original", None)
    kind: Any = type(original if isinstance(original, RamNetForCausalLM) else model)
    if kind.__init__ is not RamNetForCausalLM.__init__:
        raise ValueError(f"{kind.__name__} has a constructor of its own, so what else it holds is not known")
    given = dict(model.named_parameters())
    with torch.device("meta"):
        usual = {name for name, _ in RamNetForCausalLM(c).named_parameters()}
    if unlike := sorted(usual ^ given.keys()):
        raise ValueError(f"the model is not as it was built: {unlike[0]} is a parameter of only one of the two")
    tensors = {name: x.detach().clone() for name, x in given.items()}
    mixer = f"blocks.{layer}.mixer."
    matrix = tensors[weight := mixer + "query_key_value.weight"]
    addresses, values = matrix.tensor_split([2 * old.num_heads * old.order * old.sub_dim])
    tensors[weight] = torch.cat([longer(addresses, c.hidden_size).flatten(0, 3), values])
    if (bias := mixer + "address_bias") in tensors:
        tensors[bias] = longer(tensors[bias])
    larger: RamNetForCausalLM = kind.of(config, tensors).train(model.training)
    for name, parameter in larger.named_parameters():
        parameter.requires_grad_(given[name].requires_grad)
    return larger
