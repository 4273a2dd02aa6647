"""A model and the compiled model that shares its modules, which tests may change."""

from __future__ import annotations

import copy
from collections.abc import Iterator

import pytest
import torch

import lowering
from ramnet import RamNetForCausalLM
from tests.lowering.compiled.models import fresh, outputs


@pytest.fixture(scope="session")
def pair() -> tuple[RamNetForCausalLM, RamNetForCausalLM]:
    """A model, and the compiled model that shares its modules, after calls in prefill and decoding."""
    model = fresh()
    compiled = lowering.compile(model, backend="eager")
    for batch in (1, 2):
        outputs(compiled, batch)
    return model, compiled


@pytest.fixture
def model(pair: tuple[RamNetForCausalLM, RamNetForCausalLM]) -> Iterator[RamNetForCausalLM]:
    """The pair's model, which is restored after the test."""
    model = pair[0]
    kept = [(module, type(module), {k: copy.copy(v) for k, v in module.__dict__.items()}) for module in model.modules()]
    weights = [(parameter, parameter.detach().clone()) for parameter in model.parameters()]
    yield model
    for module, kind, own in kept:
        module.__class__ = kind
        for name in set(module.__dict__) - set(own):
            del module.__dict__[name]
        for name, value in own.items():
            if isinstance(value, dict):  # keep the dictionary object, which the compiled model shares
                module.__dict__[name].clear()
                module.__dict__[name].update(value)
            else:
                module.__dict__[name] = value
    with torch.no_grad():
        for parameter, value in weights:
            parameter.copy_(value)
            parameter.grad = None


@pytest.fixture
def fast(pair: tuple[RamNetForCausalLM, RamNetForCausalLM], model: RamNetForCausalLM) -> RamNetForCausalLM:
    """The pair's compiled model."""
    return pair[1]
