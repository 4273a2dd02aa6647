"""flash-linear-attention's kernels equal the recurrence of the baselines, gradients included."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from ramnet.baselines import flash_linear_attention
from ramnet.baselines.recurrence import linear_recurrence
from tests.gpu.conftest import DEVICE
from tests.samples import relative_rmse

pytest.importorskip("fla", reason="the kernels are those of fla: pip install flash-linear-attention")

B, H, T, K, V = 2, 3, 100, 32, 41  # linear attention has a column of ones beside 40 values


def drawn(channels: int | None, removes: bool) -> list[Tensor | None]:
    """Return q, k, v, ln w, a and b in float64, on the CPU."""
    generator = torch.Generator().manual_seed(0)

    def draw(width: int) -> Tensor:
        return torch.randn(B, H, T, width, generator=generator, dtype=torch.float64)

    q, k, v, b = draw(K), F.normalize(draw(K), dim=-1), draw(V), F.normalize(draw(K), dim=-1)
    decay = None if channels is None else -0.1 * draw(channels).exp()
    a = -draw(1).sigmoid() * b
    return [q, k, v, decay, *((a, b) if removes else (None, None))]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("removes", [False, True])
@pytest.mark.parametrize("channels", [None, 1, K])
def test_kernels_compute_the_recurrence(channels: int | None, removes: bool, dtype: torch.dtype) -> None:
    exact = [None if x is None else x.requires_grad_() for x in drawn(channels, removes)]
    dtypes = [dtype, dtype, dtype, torch.float32, dtype, dtype]  # decays are float32 in either case
    inputs = [
        None if x is None else x.detach().to(DEVICE, kind).requires_grad_()
        for x, kind in zip(exact, dtypes, strict=True)
    ]
    assert flash_linear_attention.applies(inputs[2], inputs[4]) is (dtype is torch.bfloat16 or not removes)
    found, expected = linear_recurrence(*inputs), linear_recurrence(*exact)
    most = 0.02 if dtype is torch.bfloat16 else 2e-3
    assert relative_rmse(found.cpu(), expected) < most
    cotangent = torch.randn(expected.shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    leaves = [[x for x in some if x is not None] for some in (inputs, exact)]
    grads = torch.autograd.grad(found, leaves[0], cotangent.to(DEVICE, dtype))
    wanted = torch.autograd.grad(expected, leaves[1], cotangent)
    errors = [relative_rmse(x.cpu(), y) for x, y in zip(grads, wanted, strict=True)]
    assert max(errors) < 2 * most, errors
