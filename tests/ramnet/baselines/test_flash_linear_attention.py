"""The arguments that flash-linear-attention's kernels are given are those of the recurrence.

The kernels themselves need a GPU (``tests/gpu/test_baselines.py``). In their place are the definitions that the library
documents, token by token, with its layout [B, T, H, ...].
"""

from __future__ import annotations

import sys
from dataclasses import dataclass
from types import ModuleType

import pytest
import torch
from torch import Tensor

from ramnet.baselines import flash_linear_attention
from ramnet.baselines.recurrence import linear_recurrence
from tests.samples import relative_rmse

B, T, H, K, V = 2, 9, 3, 5, 4


def chunk_dplr_delta_rule(
    q: Tensor, k: Tensor, v: Tensor, a: Tensor, b: Tensor, gk: Tensor, *, scale: float
) -> tuple[Tensor, None]:
    assert q.shape == k.shape == a.shape == b.shape == gk.shape == (B, T, H, K)
    assert v.shape == (B, T, H, V)
    state, out = v.new_zeros(B, H, K, V), []
    for t in range(T):
        seen = torch.einsum("bhk,bhkv->bhv", a[:, t], state)
        state = gk[:, t].exp().unsqueeze(-1) * state + torch.einsum("bhk,bhv->bhkv", b[:, t], seen)
        state = state + torch.einsum("bhk,bhv->bhkv", k[:, t], v[:, t])
        out.append(torch.einsum("bhk,bhkv->bhv", scale * q[:, t], state))
    return torch.stack(out, 1), None


def chunk_gla(q: Tensor, k: Tensor, v: Tensor, g: Tensor, *, scale: float) -> tuple[Tensor, None]:
    nothing = torch.zeros_like(q)
    return chunk_dplr_delta_rule(q, k, v, nothing, nothing, g, scale=scale)


def chunk_simple_gla(q: Tensor, k: Tensor, v: Tensor, g: Tensor, *, scale: float) -> tuple[Tensor, None]:
    assert g.shape == (B, T, H)
    return chunk_gla(q, k, v, g.unsqueeze(-1).expand(q.shape), scale=scale)


@pytest.fixture(autouse=True)
def library(monkeypatch: pytest.MonkeyPatch) -> None:
    kernels = {"gla": chunk_gla, "simple_gla": chunk_simple_gla, "generalized_delta_rule": chunk_dplr_delta_rule}
    monkeypatch.setitem(sys.modules, "fla", ModuleType("fla"))
    monkeypatch.setitem(sys.modules, "fla.ops", ModuleType("fla.ops"))
    for name, kernel in kernels.items():
        module = ModuleType(f"fla.ops.{name}")
        setattr(module, kernel.__name__, kernel)
        monkeypatch.setitem(sys.modules, f"fla.ops.{name}", module)


@pytest.mark.parametrize("removes", [False, True])
@pytest.mark.parametrize("channels", [None, 1, K])
def test_each_kernel_computes_the_recurrence(
    channels: int | None, removes: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    generator = torch.Generator().manual_seed(0)
    q, k, a, b = (torch.randn(B, H, T, K, generator=generator) / 2 for _ in range(4))
    v = torch.randn(B, H, T, V, generator=generator)
    decay = None if channels is None else -torch.rand(B, H, T, channels, generator=generator)
    inputs = q, k, v, decay, *((a, b) if removes else (None, None))
    expected = linear_recurrence(*inputs)
    monkeypatch.setattr(flash_linear_attention, "applies", lambda *_: True)
    assert relative_rmse(linear_recurrence(*inputs), expected) < 1e-6


@dataclass(frozen=True)
class Located:
    """What is asked of a tensor."""

    dtype: torch.dtype
    is_cuda: bool


@pytest.mark.parametrize(
    ("dtype", "is_cuda", "installed", "without_removal", "with_removal"),
    [
        (torch.float32, True, True, True, False),
        (torch.bfloat16, True, True, True, True),
        (torch.float64, True, True, False, False),
        (torch.float32, False, True, False, False),
        (torch.float32, True, False, False, False),
    ],
)
def test_kernels_are_used_where_they_take_the_dtype(
    dtype: torch.dtype, is_cuda: bool, installed: bool, without_removal: bool, with_removal: bool,
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    monkeypatch.setattr(flash_linear_attention, "find_spec", lambda _: object() if installed else None)
    value, removed = Located(dtype, is_cuda), torch.zeros(1)
    assert flash_linear_attention.applies(value, None) is without_removal  # type: ignore[arg-type]
    assert flash_linear_attention.applies(value, removed) is with_removal  # type: ignore[arg-type]
