"""Reads tokens of a model on a CPU by calls of a compiled library.

A call of a kernel from Python takes tens of microseconds, more than the whole layer of a small model. The library
(``lowering/aot/``) computes a token in one call, on the weights of the model where they are.
"""

from __future__ import annotations

import os
import threading
import warnings

import torch
from torch import Tensor, nn
from torch.autograd.graph import increment_version

from lowering.aot import weights
from lowering.aot.library import Library
from lowering.aot.weights import BLOCK
from lowering.model.as_built import AsBuilt
from lowering.model.untouched import is_plain
from ramnet.blocks import Block
from ramnet.config import RamNetConfig
from ramnet.ids import check_range, check_type
from ramnet.model import RamNetForCausalLM, RamNetOutput
from ramnet.state import RamState


class Token:
    """The library of ``model``, built at the first call that it serves.

    It computes in float32, without gradients, on a CPU. Where it does not fit, methods return None and change nothing.
    """

    def __init__(self, model: RamNetForCausalLM) -> None:
        self._model = model
        self._lock = threading.Lock()
        self._config: RamNetConfig | None = None
        self._whole: AsBuilt
        self._blocks: dict[int, AsBuilt] = {}
        self._libraries: dict[tuple[int, int], Library] = {}  # by process and number of threads
        self._unavailable = False

    def read(self, input_ids: Tensor, state: RamState | None, in_place: bool, kept: int) -> RamNetOutput | None:
        """Read one token of each of B sequences, or T tokens of one, at most ``BLOCK``: what ``forward`` computes.

        Args:
            kept: return logits of this many last tokens; 0 returns all.

        Returns None for more tokens, if the model was changed, and if no library can be built here; then one warning
        says why.

        Raises:
            TypeError, ValueError: for ids and states, as ``RamNetForCausalLM.forward`` does.
        """
        if not _are_few(input_ids) or _is_special() or not isinstance(state, RamState | None):
            return None
        batch, tokens = input_ids.shape
        if in_place and tokens != 1:
            return None
        with self._lock:
            self._match_config()
            pointers = self._whole.pointers()
            library = None if pointers is None else self._library()
            if pointers is None or library is None:
                return None
            library.rebind(pointers)
        config = self._model.config
        check_type(input_ids)
        given = state
        if state is None:
            state = RamState.zeros(config, batch)
        else:
            state.check(config, batch, input_ids.device, in_place)
        if not all(is_plain(x, torch.float32) for x in (*state.memory, *state.mass, *state.conv)):
            return None
        ids = [token for row in input_ids.tolist() for token in row]
        if min(ids) < 0 or max(ids) >= config.vocab_size:
            check_range(input_ids, config.vocab_size)
        if state is given and not in_place:
            state = state.clone()
        wanted = min(tokens, kept or tokens)
        logits = torch.empty(batch, wanted, config.vocab_size, dtype=torch.float32, device="cpu")
        if tokens == 1:
            library.step(ids, state, logits)
        else:
            library.tokens(ids, state, logits)
        state.position.add_(tokens)
        increment_version((*state.memory, *state.mass, *state.conv))  # the library writes without torch's knowledge
        return RamNetOutput(logits, state)

    def block(self, block: nn.Module, x: Tensor, memory: Tensor, mass: Tensor, position: Tensor) -> Tensor | None:
        """Run a block on one token of each sequence, x [B, 1, C], updating its state in place. Returns y [B, 1, C].

        Returns None if B is 0 or above ``BLOCK``, or the block was changed. Other parts of the model may have been.
        """
        if not 1 <= len(memory) <= BLOCK or _is_special():
            return None
        if not all(is_plain(each, torch.float32) for each in (x, memory, mass)):
            return None
        with self._lock:
            self._match_config()
            found = self._block_pointers(block)
            library = None if found is None else self._library()
        if found is None or library is None or x.shape != (len(memory), 1, self._model.config.hidden_size):
            return None
        layer, pointers = found
        y = x.clone()
        library.block(layer, pointers, (memory, mass, position), y)
        increment_version((memory, mass))
        return y

    def _match_config(self) -> None:
        config = self._model.config
        if config is not self._config:
            names = [name for name, *_ in weights.table(config, "float32")]
            self._whole = AsBuilt(self._model, lambda: RamNetForCausalLM(config), names)
            self._blocks.clear()
            self._libraries.clear()
            self._config, self._unavailable = config, False

    def _block_pointers(self, block: nn.Module) -> tuple[int, list[int]] | None:
        """Return the block's layer and the addresses of its weights, or None if it was changed."""
        layer = next((i for i, each in enumerate(self._model.blocks) if each is block), None)
        config = self._model.config
        if layer is None or layer >= config.num_layers:
            return None
        if layer not in self._blocks or self._blocks[layer].module is not block:
            prefix = f"blocks.{layer}."
            names = (name for name, *_ in weights.table(config, "float32"))
            mine = [name.removeprefix(prefix) for name in names if name.startswith(prefix)]
            self._blocks[layer] = AsBuilt(block, lambda: Block(config, layer), mine)
        pointers = self._blocks[layer].pointers()
        return None if pointers is None else (layer, pointers)

    def _library(self) -> Library | None:
        # A forked process has none of the threads of its parent.
        key = os.getpid(), torch.get_num_threads()
        if key not in self._libraries and not self._unavailable:
            from lowering.aot import build

            try:
                self._libraries[key] = Library(build.shared_library(self._model.config), key[1])
            except (ValueError, ImportError, RuntimeError, OSError) as error:
                warnings.warn(f"tokens are computed module by module: {error}", stacklevel=6)
                self._unavailable = True
        return self._libraries.get(key)


def _is_special() -> bool:
    """Return whether more is asked for than float32 results: gradients, another dtype, or a graph."""
    return torch.is_grad_enabled() or torch.is_autocast_enabled("cpu") or torch.compiler.is_compiling()


def _are_few(input_ids: Tensor) -> bool:
    """Return whether the ids are of one row or one column, and so few that the library is faster than modules.

    It reads the weights once for them. On one thread, 32 tokens of a prompt take 0.4 ("tiny") and 0.81 ("340m") of the
    modules' time, and 64 take 0.74 and 1.1. One token of each of 32 rows takes 0.39 and 0.8, and of 256 rows of "tiny",
    32 at a time, 1.12.
    """
    plain = isinstance(input_ids, Tensor) and input_ids.dim() == 2 and is_plain(input_ids, input_ids.dtype)
    return plain and 1 in input_ids.shape and 1 <= input_ids.numel() <= BLOCK
