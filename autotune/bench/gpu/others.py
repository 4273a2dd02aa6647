"""Other libraries' sequence mixers, forward and backward, which the scan is compared with at the same tokens."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import nullcontext
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from autotune.bench.gpu.run import GpuRun, finite, require_fla
from autotune.bench.run import Candidate

GLA, FLASH, CUDNN = "flash-linear-attention, chunk_gla", "FlashAttention through SDPA", "cuDNN attention through SDPA"
# Gated linear attention's heads, and widths of keys and values, at the paper's width of 1024.
GLA_HEADS, GLA_KEY, GLA_VALUE = 4, 128, 256


class Sizes(NamedTuple):
    """B, H, T, K, U, P and D; M = P^U."""

    batch: int = 16
    heads: int = 16
    tokens: int = 4096
    top_k: int = 8
    order: int = 5
    sub_dim: int = 4
    dim: int = 64

    def __str__(self) -> str:
        return f"B={self.batch} H={self.heads} T={self.tokens} K={self.top_k} M={self.sub_dim**self.order} D={self.dim}"


def chunk_gla(run: GpuRun, sizes: Sizes) -> Candidate:
    """flash-linear-attention's gated linear attention forward and backward, all gradients."""
    require_fla()
    from fla.ops.gla import chunk_gla as op

    generator = torch.Generator(run.device).manual_seed(0)

    def normal(width: int) -> Tensor:
        shape = (sizes.batch, sizes.tokens, GLA_HEADS, width)
        return torch.randn(shape, generator=generator, device=run.device).bfloat16()

    q, k, gate = (normal(GLA_KEY) for _ in range(3))
    return _forward_backward(
        GLA, lambda *x: op(*x)[0], [q, k, normal(GLA_VALUE), F.logsigmoid(gate) / 16], normal(GLA_VALUE)
    )


def attention(run: GpuRun, sizes: Sizes, backend: str) -> Candidate:
    """Causal attention forward and backward through torch's scaled_dot_product_attention."""
    from torch.nn.attention import SDPBackend, sdpa_kernel

    generator = torch.Generator(run.device).manual_seed(0)
    shape = (sizes.batch, sizes.heads, sizes.tokens, sizes.dim)
    q, k, v, grad = (torch.randn(shape, generator=generator, device=run.device).bfloat16() for _ in range(4))

    def op(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        # On a CPU, which only tests use, torch chooses the backend.
        with nullcontext() if run.device == "cpu" else sdpa_kernel([getattr(SDPBackend, backend)]):
            return F.scaled_dot_product_attention(q, k, v, is_causal=True)

    return _forward_backward(backend, op, [q, k, v], grad)


def _forward_backward(form: str, op: Callable[..., Tensor], inputs: Sequence[Tensor], grad: Tensor) -> Candidate:
    leaves = [x.requires_grad_() for x in inputs]

    def call() -> list[Tensor]:
        output = op(*leaves)
        return [output.detach(), *torch.autograd.grad(output, leaves, grad)]

    finite(form, call())
    return call
