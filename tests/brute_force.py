"""RAM-Net implemented directly from the paper's definitions: float64, dense, slow.

Every address is a vector over all M slots, the decay is the full diagonal, and gradients are computed by autograd. It
shares no code with ``ramnet``, so that it is an independent test. Step numbers are the paper's.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from tests.samples import DIFFERENTIABLE


def product_softmax(logits: Tensor) -> Tensor:
    """Step 2: logits [..., U, P] to the address over all M = P^U slots, [..., M].

    slot = Σ_u digit_u · P^(u−1): each further sub-vector is the more significant digit, hence the outer axis.
    """
    address = torch.ones(*logits.shape[:-2], 1, dtype=torch.float64)
    for sub_vector in logits.double().unbind(-2):
        address = torch.einsum("...p,...m->...pm", sub_vector.softmax(-1), address).flatten(-2)
    return address


def keep_largest(address: Tensor, top_k: int) -> Tensor:
    """Step 3: the K largest entries as they are, zero elsewhere, [..., M]."""
    kept = address.topk(top_k, dim=-1).indices
    return address * torch.zeros_like(address).scatter(-1, kept, 1.0)


def largest_weights(logits: Tensor, top_k: int) -> tuple[Tensor, Tensor, Tensor]:
    """Step 3: the K largest entries, descending, [..., K]; numbers as gradients of them; and by these that of logits.

    By autograd through the entries that are kept. The gradients are drawn of the weights' values, not of their
    places, so that entries of equal weight may stand in either order.
    """
    leaf = logits.double().requires_grad_()
    weights = keep_largest(product_softmax(leaf), top_k).sort(-1, descending=True).values[..., :top_k]
    grads = torch.cos(1e4 * weights.detach())
    (gradient,) = torch.autograd.grad(weights, leaf, grads)
    return weights.detach(), grads.to(logits.dtype), gradient


def cape(address: Tensor) -> Tensor:
    """Step 4: [P_t(a)]_i = a_((i+t) mod M) for an address [..., T, M] whose row t stands at position t."""
    tokens, num_slots = address.shape[-2:]
    source = (torch.arange(num_slots) + torch.arange(tokens).unsqueeze(-1)) % num_slots
    return address.gather(-1, source.expand_as(address))


def k_hot(slots: Tensor, weights: Tensor, num_slots: int) -> Tensor:
    """The address vector [..., M] with ``weights`` at ``slots`` and zero elsewhere."""
    zeros = torch.zeros(*slots.shape[:-1], num_slots, dtype=torch.float64)
    return zeros.scatter(-1, slots.long(), weights.double())


class _Decay(torch.autograd.Function):
    """Steps 5 and 7: (1 − w)^γ forward; backward, the derivative of (ε' + (1 − ε')(1 − w))^γ."""

    @staticmethod
    def forward(ctx: Any, w: Tensor, power: float, proxy_eps: float) -> Tensor:
        ctx.save_for_backward(w)
        ctx.power, ctx.proxy_eps = power, proxy_eps
        return (1 - w) ** power

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None, None]:
        (w,) = ctx.saved_tensors
        with torch.enable_grad():
            w = w.detach().requires_grad_()
            proxy = (ctx.proxy_eps + (1 - ctx.proxy_eps) * (1 - w)) ** ctx.power
        return torch.autograd.grad(proxy, w, grads)[0], None, None


def pdma(
    write: Tensor, read: Tensor, values: Tensor, memory: Tensor, mass: Tensor,
    decay_power: float, eps: float, proxy_eps: float,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """Steps 5 to 7 on dense addresses [B, H, T, M], values [B, H, T, D], S [B, H, M, D] and z [B, H, M]."""
    outputs = []
    for w, r, v in zip(write.unbind(2), read.unbind(2), values.unbind(2), strict=True):
        decay = _Decay.apply(w, decay_power, proxy_eps)
        memory = decay.unsqueeze(-1) * memory + w.unsqueeze(-1) * v.unsqueeze(-2)
        mass = decay * mass + w
        outputs.append(torch.einsum("bhm,bhmd->bhd", r / (mass + eps), memory))
    return torch.stack(outputs, 2) if outputs else 0 * values, memory, mass


def memory_scan(
    inputs: Mapping[str, Tensor], decay_power: float = 1.0, eps: float = 1e-6, proxy_eps: float = 0.01
) -> tuple[Tensor, Tensor, Tensor]:
    """``pdma`` on K slots a token: [B, H, T, K]."""
    num_slots = inputs["memory"].shape[2]
    write, read = (k_hot(inputs[f"{x}_slots"], inputs[f"{x}_weights"], num_slots) for x in ("write", "read"))
    values, memory, mass = (inputs[name].double() for name in ("values", "memory", "mass"))
    return pdma(write, read, values, memory, mass, decay_power, eps, proxy_eps)


def memory_scan_gradients(
    given: Sequence[Tensor], inputs: Mapping[str, Tensor], decay_power: float = 1.0, eps: float = 1e-6,
    proxy_eps: float = 0.01,
) -> tuple[Tensor, ...]:  # fmt: skip
    """Of ``DIFFERENTIABLE``, in float64, by autograd from those given of the output, the final memory and mass."""
    leaves = {name: x.double().requires_grad_() if name in DIFFERENTIABLE else x for name, x in inputs.items()}
    results = memory_scan(leaves, decay_power, eps, proxy_eps)
    wanted = [leaves[name] for name in DIFFERENTIABLE]
    return torch.autograd.grad(results, wanted, [x.double() for x in given], materialize_grads=True)


def language_model(config: Any, parameters: Mapping[str, Tensor], input_ids: Tensor) -> Tensor:
    """Logits [B, T, V] of the paper's model (steps 1 to 8), from the first token on; no convolution blocks."""
    weights = {name: tensor.double() for name, tensor in parameters.items()}

    def norm(name: str, x: Tensor) -> Tensor:
        return F.layer_norm(x, x.shape[-1:], weights[f"{name}.weight"], weights[f"{name}.bias"], config.norm_eps)

    x = weights["embedding.weight"][input_ids]
    for i in range(config.num_layers):
        block = {name.removeprefix(f"blocks.{i}."): w for name, w in weights.items() if name.startswith(f"blocks.{i}.")}
        mixer = {name.removeprefix("mixer."): w for name, w in block.items()}
        x = x + _mixer(config, i, mixer, norm(f"blocks.{i}.mixer_norm", x))
        if config.intermediate_size:
            w_gate, w_up = block["ffn.gate_up.weight"].chunk(2)
            h = norm(f"blocks.{i}.ffn_norm", x)
            x = x + (F.silu(h @ w_gate.T) * (h @ w_up.T)) @ block["ffn.down.weight"].T
    return norm("norm", x) @ weights["head.weight"].T


def _mixer(config: Any, layer: int, weights: Mapping[str, Tensor], x: Tensor) -> Tensor:
    """One RAM-Net layer, head by head, [B, T, C]; the stacked projection holds W_q, W_k and W_v in this order."""
    names = ("num_heads", "value_dim", "order", "sub_dim", "top_k")
    each = (getattr(config, name) for name in names)
    heads, value_dim, order, sub_dim, top_k = (x if isinstance(x, int) else x[layer] for x in each)
    width, num_slots = order * sub_dim, sub_dim**order
    sizes = [heads * width, heads * width, heads * value_dim]
    w_q, w_k, w_v = (w.unflatten(0, (heads, -1)) for w in weights["query_key_value.weight"].split(sizes))
    alpha_q, alpha_k = weights["log_scale"]
    full, half = config.cape_full_layers, config.cape_half_layers
    with_cape = heads if layer < full else heads // 2 if layer < full + half else 0
    outputs = []
    for h in range(heads):
        address = []
        for side, (w, alpha) in enumerate(((w_q[h], alpha_q[h]), (w_k[h], alpha_k[h]))):
            bias = weights["address_bias"][side, h].flatten() if "address_bias" in weights else 0
            scaled = alpha.exp() * (x @ w.T + bias) / config.temperature  # [B, T, U·P]
            kept = keep_largest(product_softmax(scaled.unflatten(-1, (order, sub_dim))), top_k)
            address.append((cape(kept) if h < with_cape else kept).unsqueeze(1))
        read, write = address  # [B, 1, T, M]
        memory = torch.zeros(len(x), 1, num_slots, value_dim, dtype=torch.float64)
        mass = torch.full((len(x), 1, num_slots), 1 / num_slots, dtype=torch.float64)
        values = (x @ w_v[h].T).unsqueeze(1)
        output, _, _ = pdma(write, read, values, memory, mass, config.decay_power, config.eps, config.proxy_eps)
        outputs.append(output.squeeze(1))
    return torch.cat(outputs, -1) @ weights["output.weight"].T
