"""The C library of a model, called as a C program calls it, with the weights in a file."""

from __future__ import annotations

import ctypes
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from safetensors.torch import save_file

from lowering.aot import build, weights
from ramnet import RamNetConfig, RamNetForCausalLM
from tests.samples import relative_rmse

# Layers that differ in every size; CAPE on all, half and none of their heads.
OTHER_SIZES = RamNetConfig(
    vocab_size=37, hidden_size=18, num_layers=3, num_heads=[8, 4, 2], value_dim=[2, 3, 9], order=[2, 3, 1],
    sub_dim=[4, 4, 64], top_k=[4, 8, 16], cape_full_layers=1, cape_half_layers=1, decay_power=2.5, temperature=0.7,
    intermediate_size=29, conv_layers=1, conv_kernel=5, address_bias="offsets",
)  # fmt: skip
TINY = RamNetConfig.preset("tiny", hidden_size=64, intermediate_size=96, num_heads=2)


def model_of(config: RamNetConfig) -> RamNetForCausalLM:
    """Return a model whose norms and scales are not 1 and 0, which would hide mistakes."""
    torch.manual_seed(0)
    model = RamNetForCausalLM(config).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() == 1 or parameter.shape[0] == 2:
                parameter.add_(torch.randn_like(parameter), alpha=0.2)
    return model


def as_stored(model: RamNetForCausalLM, precision: str) -> RamNetForCausalLM:
    """Replace the parameters of ``model`` by what the weights' file of that precision says."""
    stored = weights.stored(model.state_dict(), model.config, precision)
    model.load_state_dict(weights.restored(stored, model.config, precision), strict=False)
    return model


class CLibrary:
    """The library of ``model``; a status other than 0 raises RuntimeError with the message."""

    def __init__(
        self, model: RamNetForCausalLM, folder: Path, precision: str = "float32", threads: int = 1,
        path: Path | None = None,
    ) -> None:  # fmt: skip
        self.vocabulary = model.config.vocab_size
        self.c = _load(path or build.shared_library(model.config, precision))
        self.weights = folder / f"{precision}.safetensors"
        save_file(weights.stored(model.state_dict(), model.config, precision), self.weights)
        self.model = ctypes.c_void_p()
        self.call("open", str(self.weights).encode(), threads, ctypes.byref(self.model))

    def call(self, name: str, *arguments: Any) -> None:
        if getattr(self.c, f"ramnet_{name}")(*arguments):
            raise RuntimeError(self.c.ramnet_message().decode())

    def state(self) -> ctypes.c_void_p:
        made = ctypes.c_void_p()
        self.call("state_create", self.model, ctypes.byref(made))
        return made

    def token(self, state: ctypes.c_void_p, token: int) -> NDArray[np.float32]:
        logits = np.empty(self.vocabulary, np.float32)
        self.call("token", self.model, state, ctypes.c_int32(token), _at(logits))
        return logits

    def tokens(self, state: ctypes.c_void_p, ids: NDArray[np.int32], last: int) -> NDArray[np.float32]:
        logits = np.empty((last, self.vocabulary), np.float32)
        self.call("tokens", self.model, state, _at(ids), len(ids), _at(logits), last)
        return logits

    def step(self, states: list[ctypes.c_void_p], ids: NDArray[np.int32]) -> NDArray[np.float32]:
        logits = np.empty((len(ids), self.vocabulary), np.float32)
        held = (ctypes.c_void_p * len(states))(*(state.value for state in states))
        self.call("step", self.model, held, _at(ids), len(ids), _at(logits))
        return logits


def ids_of(count: int, vocabulary: int, seed: int = 1) -> NDArray[np.int32]:
    return np.random.default_rng(seed).integers(0, vocabulary, count, dtype=np.int32)


@torch.no_grad()
def eager_logits(model: RamNetForCausalLM, ids: NDArray[np.int32]) -> NDArray[np.float32]:
    found: NDArray[np.float32] = model(torch.from_numpy(ids.astype(np.int64))[None]).logits[0].numpy()
    return found


def error(got: NDArray[np.float32], want: NDArray[np.float32]) -> float:
    """Return the relative L2 error."""
    return relative_rmse(torch.from_numpy(got), torch.from_numpy(want))


@cache
def _load(path: Path) -> ctypes.CDLL:
    library = ctypes.CDLL(str(path))
    library.ramnet_message.restype = ctypes.c_char_p
    library.ramnet_state_position.restype = ctypes.c_int64
    return library


def _at(array: NDArray[Any]) -> ctypes.c_void_p:
    return ctypes.c_void_p(array.ctypes.data)
