"""Tests at sizes that only a GPU can run; they are skipped, with the reason, without one."""

from __future__ import annotations

import warnings

import pytest
import torch

from lowering import targets

DEVICE = "cuda"


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    if not torch.cuda.is_available():
        for item in items:
            if "tests/gpu/" in item.path.as_posix():
                item.add_marker(pytest.mark.skip(reason="there is no CUDA device"))


@pytest.fixture(scope="session")
def target() -> str:
    """The target of this machine's GPU, or of the nearest architecture."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)
        found = targets.here()
    assert found is not None
    return found.name
