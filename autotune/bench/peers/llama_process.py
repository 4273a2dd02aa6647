"""Runs llama.cpp in a process of the peers' interpreter, as ``serving`` says.

It imports only llama_cpp, gguf, numpy and the standard library, and modules that import no more.
"""

from __future__ import annotations

import ctypes
import importlib.metadata
from collections.abc import Iterable
from functools import cache
from typing import Any

import llama_cpp
import numpy as np

from autotune.bench.peers import gguf_models, serving

# The tokens whose keys and values fill a longer cache, and the tokens that a context holds beyond those asked for.
CHUNK, SPARE = 128, 64
# The tokens of a prompt that are read at once, as in llama.cpp's own programs.
_BLOCK = 512


@cache
def _model(path: str, relaid: bool) -> Any:
    """Return the model in a file. ``relaid`` lets llama.cpp lay out its weights anew, for AMX among others."""
    settings = llama_cpp.llama_model_default_params()
    settings.use_extra_bufts = relaid
    found = llama_cpp.llama_model_load_from_file(path.encode(), settings)
    if not found:
        raise RuntimeError(f"llama.cpp cannot load {path}")
    return found


class Context:
    """A model and what it has read.

    Args:
        relaid: as for ``_model``.
        sequences: the number of sequences, which are read together.
        tokens: the most tokens of all sequences, but for a few that are read and forgotten.
        flash: compute attention without a matrix of scores. On CPUs, prompts were 1.1 times as fast with it, and tokens
            after 4096 took 3 times as long.
        block: the most tokens of a prompt that are read at once.
    """

    def __init__(
        self, path: str, relaid: bool, threads: int, sequences: int = 1, tokens: int = CHUNK, flash: bool = False,
        block: int = _BLOCK,
    ) -> None:  # fmt: skip
        self._model = _model(path, relaid)
        settings = llama_cpp.llama_context_default_params()
        settings.n_ctx = tokens + SPARE * sequences
        settings.n_batch = settings.n_ubatch = _BLOCK
        settings.n_seq_max = sequences + 1
        settings.n_threads = settings.n_threads_batch = threads
        settings.kv_unified = True
        settings.flash_attn_type = int(flash)
        self._context = llama_cpp.llama_init_from_model(self._model, settings)
        if not self._context:
            raise RuntimeError(f"llama.cpp cannot make a context of {settings.n_ctx} tokens")
        self._memory: Any = llama_cpp.llama_get_memory(self._context)
        self._batch = llama_cpp.llama_batch_init(_BLOCK, 0, 1)
        self._sequences, self._block, self._position = sequences, block, 0
        self._random = np.random.default_rng(0)

    def prefill(self, tokens: int) -> None:
        """Read random tokens of one sequence after forgetting all."""
        llama_cpp.llama_memory_clear(self._memory, False)
        for begin in range(0, tokens, self._block):
            end = min(begin + self._block, tokens)
            self._decode((position, 0, position == tokens - 1) for position in range(begin, end))
        self._position = tokens

    def fill(self, tokens: int) -> None:
        """Make the cache hold ``tokens`` tokens, a multiple of ``CHUNK``, without computing all of them.

        The keys and values of ``CHUNK`` tokens are restored again and again at later positions, for which llama.cpp
        rotates the keys. A token's time depends on how many there are and not on what they hold.
        """
        self.prefill(CHUNK)
        size = llama_cpp.llama_state_seq_get_size(self._context, 0)
        held = (ctypes.c_uint8 * size)()
        llama_cpp.llama_state_seq_get_data(self._context, held, size, 0)
        for begin in range(CHUNK, tokens, CHUNK):
            if not llama_cpp.llama_state_seq_set_data(self._context, held, size, 1):
                raise RuntimeError(f"llama.cpp cannot restore {CHUNK} tokens after {begin}")
            llama_cpp.llama_memory_seq_add(self._memory, 1, -1, -1, begin)
            llama_cpp.llama_memory_seq_cp(self._memory, 1, 0, -1, -1)
            llama_cpp.llama_memory_seq_rm(self._memory, 1, -1, -1)
        self._position = tokens
        last = llama_cpp.llama_memory_seq_pos_max(self._memory, 0)
        if last != tokens - 1:
            raise RuntimeError(f"llama.cpp's cache ends at position {last}, not {tokens - 1}")

    def decode(self, tokens: int) -> None:
        """Read ``tokens`` tokens of each sequence in turn, and forget them if that is possible."""
        for position in range(self._position, self._position + tokens):
            self._decode((position, sequence, True) for sequence in range(self._sequences))
        if not np.isfinite(self._logits()).all():
            raise RuntimeError("llama.cpp gives logits that are not finite")
        for sequence in range(self._sequences):
            kept = llama_cpp.llama_memory_seq_rm(self._memory, sequence, self._position, -1)
        if not kept:  # a recurrent state does not forget
            self._position += tokens

    def _decode(self, entries: Iterable[tuple[int, int, bool]]) -> None:
        """Read a random token for each position and sequence, with logits if the entry's last item is true."""
        batch = self._batch
        batch.n_tokens = 0
        for i, (position, sequence, wanted) in enumerate(entries):
            batch.token[i] = int(self._random.integers(gguf_models.VOCABULARY))
            batch.pos[i], batch.n_seq_id[i], batch.logits[i] = position, 1, wanted
            batch.seq_id[i][0] = sequence
            batch.n_tokens += 1
        status = llama_cpp.llama_decode(self._context, batch)
        if status:
            raise RuntimeError(f"llama_decode gave {status}")
        llama_cpp.llama_synchronize(self._context)

    def _logits(self) -> Any:
        return np.ctypeslib.as_array(llama_cpp.llama_get_logits_ith(self._context, -1), (gguf_models.VOCABULARY,))


_contexts: dict[str, Context] = {}


def _open(context: str, **settings: Any) -> None:
    llama_cpp.llama_backend_init()
    _contexts[context] = Context(**settings)


def _versions() -> dict[str, str]:
    return {name: importlib.metadata.version(name) for name in ("llama-cpp-python", "gguf")}


if __name__ == "__main__":
    serving.serve({
        "versions": _versions,
        "write": gguf_models.write,
        "open": _open,
        "fill": lambda context, tokens: _contexts[context].fill(tokens),
        "prefill": lambda context, tokens: _contexts[context].prefill(tokens),
        "decode": lambda context, tokens: _contexts[context].decode(tokens),
    })  # fmt: skip
