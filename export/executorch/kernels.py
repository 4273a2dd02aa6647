"""A whole token as one ExecuTorch kernel, over the objects that are compiled ahead of time."""

from __future__ import annotations

import hashlib
import shutil
import tempfile
from importlib.util import find_spec
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from export.executorch.program import StateBuffers
from lowering.aot import build, weights
from lowering.compilers import cxx
from ramnet import RamNetConfig

_SOURCE = Path(__file__).with_name("kernels.cpp")
_ARGUMENTS = "Tensor ids, Tensor[] weights, Tensor(a!)[] state, Tensor(b!) position"
# The last as the wheel's libraries were compiled, whose headers would otherwise ask for a file of PyTorch's build.
FLAGS = ("-std=c++17", "-O2", "-DC10_USING_CUSTOM_GENERATED_MACROS")


class KernelToken(StateBuffers):
    """Reads one token with a single operator, ``ramnet::token_DIGEST``, of the library that ``write`` builds.

    Args:
        stored: the weights of a model as ``weights.stored`` gives them.
        config: the model's.
        precision: the type of the weight matrices, a key of ``weights.FILE_TYPES``.
    """

    def __init__(self, stored: dict[str, Tensor], config: RamNetConfig, precision: str) -> None:
        super().__init__(config)
        self.precision = precision
        nothing = torch.empty(0)
        names = [(name, dtype) for name, dtype, _ in weights.table(config, precision)]
        self.weights = torch.nn.ParameterList(
            torch.nn.Parameter(stored[name] if dtype else nothing, requires_grad=False) for name, dtype in names
        )
        self._operator = _define(_name(self), config.vocab_size)

    def forward(self, ids: Tensor) -> Tensor:
        """Return logits [1, 1, V] of ids [1, 1]."""
        state = [*self.layers("memory"), *self.layers("mass"), *self.layers("conv")]
        logits: Tensor = self._operator(ids, list(self.weights), state, self.position)
        return logits


def write(token: KernelToken, library: Path) -> None:
    """Build the shared library with the kernel of ``token``, to be loaded before the program.

    Raises:
        ImportError: if TVM is not installed.
        RuntimeError: if there is no C++ compiler, or a compiler fails.
    """
    with tempfile.TemporaryDirectory(prefix="ramnet-") as place:
        folder = Path(place)
        build.write_sources(token.config, folder, token.precision)
        build.archive(folder, folder / "libramnet.a")
        found = wheel()
        build.run(
            *compiler(), *FLAGS, f'-DRAMNET_OPERATOR="{_name(token)}.out"', "-I", folder, *found.includes, "-shared",
            "-fPIC", "-fvisibility=hidden", "-o", folder / "library.so", _SOURCE, folder / "libramnet.a",
            "-Wl,--exclude-libs,ALL", "-L", found.libraries, "-lexecutorch", "-lexecutorch_threadpool", "-lm",
            "-pthread",
        )  # fmt: skip
        # A linker on a full disk says so in many lines, so the library is copied to where it belongs.
        shutil.copy(folder / "library.so", library)


class Wheel(NamedTuple):
    """What a C++ program is compiled and linked with: the compiler's -I options and the folder of the libraries."""

    includes: tuple[str, str]
    libraries: Path


def wheel() -> Wheel:
    """Return the headers and libraries in the installed package."""
    spec = find_spec("executorch")
    assert spec is not None and spec.submodule_search_locations
    root = Path(next(iter(spec.submodule_search_locations)))
    headers = root / "include"
    c10 = headers / "executorch" / "runtime" / "core" / "portable_type" / "c10"
    return Wheel((f"-I{headers}", f"-I{c10}"), root / "lib")


def compiler() -> list[str]:
    """Return the command of the C++ compiler: ``$CXX``, or the first of c++, g++ and clang++. Raises RuntimeError if
    there is none."""
    found = cxx("c++", "g++", "clang++")
    if found is None:
        raise RuntimeError("there is no C++ compiler; install g++ or clang++, or name one in CXX")
    return found


def _name(token: KernelToken) -> str:
    return f"token_{hashlib.sha256(f'{token.config.to_json()} {token.precision}'.encode()).hexdigest()[:16]}"


_LIBRARY = torch.library.Library("ramnet", "FRAGMENT")


def _define(name: str, vocabulary: int) -> Any:
    """Return the operator of that name; torch.export needs its shapes, and only ExecuTorch has its kernel."""
    if not hasattr(torch.ops.ramnet, name):
        _LIBRARY.define(f"{name}({_ARGUMENTS}) -> Tensor")
        _LIBRARY.define(f"{name}.out({_ARGUMENTS}, *, Tensor(c!) out) -> Tensor(c!)")

        def logits(ids: Tensor, weights: list[Tensor], state: list[Tensor], position: Tensor) -> Tensor:
            return position.new_empty((1, 1, vocabulary), dtype=torch.float32)

        torch.library.register_fake(f"ramnet::{name}", logits)
    return getattr(torch.ops.ramnet, name).default
