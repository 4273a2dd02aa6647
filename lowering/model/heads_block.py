"""Blocks that decode a token on a GPU, all between two projections in one launch (``GpuKernels.decode_heads``).

The products with weights stay torch's, whatever the batch.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from ramnet.model import Block
from ramnet.ops import registered

# By schema, for the reason that ramnet/ops/library.py gives at memory_step.
_LIBRARY = torch.library.Library("ramnet", "FRAGMENT")
_LIBRARY.define(
    "decode_heads(Tensor projected, Tensor log_scale, Tensor position, Tensor(a!) memory, Tensor(b!) mass, int order,"
    " int sub_dim, int top_k, int cape_heads, float temperature, float decay_power, float eps, str kernels) -> Tensor"
)


def _decode_heads(
    projected: Tensor, log_scale: Tensor, position: Tensor, memory: Tensor, mass: Tensor, order: int, sub_dim: int,
    top_k: int, cape_heads: int, temperature: float, decay_power: float, eps: float, kernels: str,
) -> Tensor:  # fmt: skip
    return registered(kernels).decode_heads(  # type: ignore[attr-defined]
        projected, log_scale, position, memory, mass, order, sub_dim, top_k, cape_heads, temperature, decay_power, eps
    )


_LIBRARY.impl("decode_heads", _decode_heads, "CompositeExplicitAutograd")


@torch.library.register_fake("ramnet::decode_heads")
def _(
    projected: Tensor, log_scale: Tensor, position: Tensor, memory: Tensor, mass: Tensor, order: int, sub_dim: int,
    top_k: int, cape_heads: int, temperature: float, decay_power: float, eps: float, kernels: str,
) -> Tensor:  # fmt: skip
    return projected.new_empty(projected.shape[0], memory.shape[1] * memory.shape[3])


class HeadsBlock(Block):
    """A block that shares the modules of another; gradients and states that are not contiguous go to those."""

    def __init__(self, block: Block, kernels: str) -> None:
        nn.Module.__init__(self)
        self._modules, self.has_ffn, self.kernels = block._modules, block.has_ffn, kernels

    def forward(
        self, x: Tensor, memory: Tensor, mass: Tensor, position: Tensor, in_place: bool
    ) -> tuple[Tensor, Tensor, Tensor]:
        ready = memory.is_contiguous() and mass.is_contiguous()
        if not in_place or not ready or torch.is_grad_enabled():
            return super().forward(x, memory, mass, position, in_place)
        mixer, c = self.mixer, self.mixer.config
        projected = mixer.query_key_value(self.mixer_norm(x)).flatten(1)  # [B, 2·H·U·P + H·D]
        out = torch.ops.ramnet.decode_heads(
            projected, mixer.log_scale, position, memory, mass, c.order, c.sub_dim, c.top_k, mixer.cape_heads,
            c.temperature, c.decay_power, c.eps, self.kernels,
        )  # fmt: skip
        x = x + mixer.output(out).unsqueeze(1)
        if self.has_ffn:
            x = x + self.ffn(self.ffn_norm(x))
        return x, memory, mass
