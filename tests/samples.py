"""Helpers of the tests: inputs of the memory ops, errors, the largest tensor created, a full disk."""

from __future__ import annotations

import os
import resource
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from ramnet.ops.accesses import Accesses

# Names of memory_scan's tensors, in its order, and those that carry gradients.
DIFFERENTIABLE = ("write_weights", "read_weights", "values", "memory", "mass")

# The largest relative RMSE against float64 on the same rounded inputs: sums are float32 or float64, and results are
# rounded once to their dtype.
TOLERANCE = {torch.float64: 1e-12, torch.float32: 1e-5, torch.float16: 1e-3, torch.bfloat16: 6e-3}


def relative_rmse(actual: Tensor, expected: Tensor) -> float:
    """‖actual − expected‖ / ‖expected‖ in float64; infinite for a NaN, and where anything but zero meets zeros."""
    if actual.shape != expected.shape:
        raise AssertionError(f"shape {list(actual.shape)}, expected {list(expected.shape)}")
    actual, expected = actual.detach().double(), expected.detach().double()
    error, scale = float((actual - expected).norm()), float(expected.norm())
    if error == 0:
        return 0.0
    return error / scale if scale > 0 and error == error else float("inf")


class LargestTensor(TorchDispatchMode):
    """Measure the elements of the largest tensor that an operator creates within the block."""

    numbers = 0

    def __torch_dispatch__(self, operator: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = operator(*args, **(kwargs or {}))
        self.numbers = max([self.numbers, *(x.numel() for x in tree_leaves(result) if isinstance(x, Tensor))])
        return result


def scan_inputs(  # noqa: PLR0913 - six sizes, in the order of the axes, and what a test may change of the rest
    batch: int, heads: int, tokens: int, top_k: int, num_slots: int, value_dim: int, *,
    dtype: torch.dtype = torch.float32, state_dtype: torch.dtype | None = None, access: str = "uniform", seed: int = 0,
) -> dict[str, Tensor]:  # fmt: skip
    """The tensors of memory_scan, by name, with a non-zero state.

    access: "uniform"; "hot", where slot 0 takes part in most tokens; or "saturated", where write weights are often
    exactly 1 and sometimes exactly 0.
    """
    generator = torch.Generator().manual_seed(seed)
    leading = (batch, heads, tokens)

    def uniform(*shape: int) -> Tensor:
        return torch.rand(shape, generator=generator)

    def slots() -> Tensor:
        order = uniform(*leading, num_slots)
        if access == "hot":
            order[..., 0] += (uniform(*leading) < 0.9).float()
        return order.topk(top_k, dim=-1).indices.to(torch.int32)

    write_weights = uniform(*leading, top_k)
    if access == "saturated":
        which = uniform(*leading, top_k)
        write_weights[which < 0.3] = 1.0
        write_weights[which > 0.9] = 0.0
    state_dtype = state_dtype or dtype
    return {
        "write_slots": slots(),
        "write_weights": write_weights.to(dtype),
        "read_slots": slots(),
        "read_weights": uniform(*leading, top_k).to(dtype),
        "values": torch.randn(*leading, value_dim, generator=generator).to(dtype),
        "memory": torch.randn(batch, heads, num_slots, value_dim, generator=generator).to(state_dtype),
        "mass": (0.1 + uniform(batch, heads, num_slots)).to(state_dtype),
    }


def cotangents(inputs: dict[str, Tensor]) -> list[Tensor]:
    """Random gradients of the output, the final memory and the final mass, of their dtypes."""
    generator = torch.Generator().manual_seed(1)
    like = (inputs["values"], inputs["memory"], inputs["mass"])
    return [torch.randn(x.shape, generator=generator).to(x.dtype) for x in like]


def step_inputs(inputs: dict[str, Tensor], token: int) -> dict[str, Tensor]:
    """The tensors of memory_step for one token of ``scan_inputs``; memory and mass are copies."""
    return {
        name: x.clone() if name in ("memory", "mass") else x[:, :, token].contiguous() for name, x in inputs.items()
    }


def as_backends_take(tensors: Iterable[Tensor]) -> tuple[Accesses[Tensor], Tensor, Tensor, Tensor]:
    """Accesses, values, memory and mass, from the tensors of memory_scan or memory_step in their order."""
    *accesses, values, memory, mass = tensors
    return Accesses(*accesses), values, memory, mass


def strided(tensor: Tensor) -> Tensor:
    """A copy with gaps between elements and the first two axes swapped in storage."""
    spread = torch.stack([tensor, torch.full_like(tensor, 99)], dim=-1)
    if tensor.dim() > 1:
        spread = spread.transpose(0, 1).contiguous().transpose(0, 1)
    return spread[..., 0]


@contextmanager
def full_disk(after: int) -> Iterator[None]:
    """Limit files to ``after`` bytes within the block; the system then refuses writes as on a full disk."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (after, before[1]))  # Python ignores the signal; write() fails
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


def read_only_folder(where: Path) -> Path:
    """A folder in which no file can be created; skips the test if there is none."""
    folder = where / "read-only"
    folder.mkdir(mode=0o555)
    if not os.access(folder, os.W_OK):
        return folder
    # Root can write everywhere except in the system's virtual folders.
    kernel = Path("/sys/kernel")
    if not kernel.is_dir():
        pytest.skip("root may write anywhere here")
    return kernel
