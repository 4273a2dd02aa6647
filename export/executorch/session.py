"""Runs an exported .pte file from Python."""

from __future__ import annotations

import ctypes
from pathlib import Path

import torch
from torch import Tensor

from export.libraries import need
from export.manifest import EXECUTORCH_FORMAT, Manifest
from ramnet import RamNetConfig, RamState

PROGRAM, LIBRARY = "model.pte", "libramnet_executorch.so"


class ExecutorchModel:
    """An exported model with one state, which each token updates.

    Another ``ExecutorchModel`` of the same folder has another state; the weights are mapped from the file.

    Args:
        directory: the folder that ``export_executorch`` wrote.

    Raises:
        ValueError: if ``directory`` is not an ExecuTorch export, a file is damaged, or ExecuTorch cannot load it.
        OSError: if the system cannot load the library with the kernels.
        ImportError: if executorch is not installed.
    """

    def __init__(self, directory: str | Path) -> None:
        need("executorch", extra="executorch")
        # executorch.runtime, which wraps the same calls, also imports all of the exporter: 5 s.
        from executorch.extension.pybindings import _C

        path = Path(directory) / PROGRAM
        manifest = Manifest.load(Path(directory))  # raises before the library's code runs
        if manifest.format != EXECUTORCH_FORMAT:
            raise ValueError(f"{directory} has the format {manifest.format}; it must be {EXECUTORCH_FORMAT}")
        library = path.with_name(LIBRARY)
        if LIBRARY in manifest.files:
            ctypes.CDLL(str(library.resolve()))  # registers its kernel
        try:
            self._program = _C._load_program(str(path))
            self._token, self._reset = (self._program.load_method(name) for name in ("forward", "reset"))
            self.config = RamNetConfig.model_validate_json(self._program.load_method("config")([])[0])
        except RuntimeError as error:
            raise ValueError(f"{path} cannot be loaded by ExecuTorch: {' '.join(str(error).split())}") from None
        # Tensors that share the memory of the program's buffers.
        first = RamState.zeros(self.config, 1)
        own = {name: self._token.get_attribute(name).view(like.shape) for name, like in first.tensors().items()}
        c = self.config
        self._state = RamState(
            [own[f"memory.{i}"] for i in range(c.num_layers)], [own[f"mass.{i}"] for i in range(c.num_layers)],
            [own[f"conv.{i}"] for i in range(c.conv_layers)], own["position"],
        )  # fmt: skip

    @property
    def state(self) -> RamState:
        """A copy of the state, which ``RamState.save`` writes to a file that every runtime reads.

        Assignment copies into the program's buffers; it raises what ``RamState.check`` does, and changes nothing, if
        the state is not one of this model for one row.
        """
        return self._state.clone()

    @state.setter
    def state(self, state: RamState) -> None:
        state.check(self.config, 1, torch.device("cpu"))
        for name, buffer in self._state.tensors().items():
            buffer.copy_(state.tensors()[name])

    def token(self, token: int) -> Tensor:
        """Read one token. Returns logits, float32 [V]."""
        if not 0 <= token < self.config.vocab_size:
            raise ValueError(f"the id is {token}; it must be in 0..{self.config.vocab_size - 1}")
        logits: Tensor = self._token([torch.tensor([[token]])])[0]
        return logits.flatten()

    @property
    def threads(self) -> int:
        """The number of ExecuTorch's threads, which all programs of the process share."""
        from executorch.extension.pybindings import _C

        return int(_C._threadpool_get_thread_count())

    def reset(self) -> None:
        """Forget all tokens."""
        self._reset([])
