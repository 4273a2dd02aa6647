"""The state of an exported model, held in arrays that onnxruntime updates in place."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, MutableMapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, Self

import numpy as np
from numpy.typing import ArrayLike, NDArray

from export.onnx import ports
from ramnet.config import RamNetConfig
from ramnet.files import safetensors_read, safetensors_written_aside
from ramnet.state_files import Described, check

if TYPE_CHECKING:
    from torch import Tensor

    from ramnet import RamState

POSITION = "position"
# The types that a state file may have, by their names in safetensors files.
_STORED = {"BF16": "<u2", "F16": "<f2", "F32": "<f4", "F64": "<f8", "I32": "<i4", "I64": "<i8"}


class OnnxState:
    """The state of an ``OnnxSession``: arrays by the names of ``RamState.tensors``.

    The arrays are float32, positions int64. Their addresses never change, because ``OnnxSession.step`` updates them in
    place: the constructor copies its arguments, and ``tensors`` returns views.

    Raises:
        ValueError: if an array cannot be converted to its dtype, for example a floating position.
    """

    def __init__(self, tensors: Mapping[str, ArrayLike]) -> None:
        self._arrays = {name: np.array(_numbers(name, x), dtype=_dtype(name), order="C") for name, x in tensors.items()}

    @property
    def tensors(self) -> OnnxTensors:
        """The arrays by name; assignment copies into an array."""
        return OnnxTensors(self._arrays)

    @classmethod
    def zeros(cls, config: RamNetConfig, batch_size: int) -> Self:
        """Return the state before the first token."""
        if batch_size < 1:
            raise ValueError(f"batch_size is {batch_size}; it must be at least 1")
        state = cls(
            {port.name: np.zeros([batch_size, *port.shape[1:]], _dtype(port.name)) for port in ports.state(config)}
        )
        for i, layer in enumerate(config.layers):
            state.tensors[f"mass.{i}"][:] = 1 / layer.slots
        return state

    @classmethod
    def of(cls, state: RamState) -> Self:
        """Copy a PyTorch state, converting it to float32."""
        return cls({name: x if name == POSITION else x.float() for name, x in state.tensors().items()})

    def clone(self) -> Self:
        """Return a copy that shares no memory with this state."""
        return type(self)(self._arrays)

    def save(self, path: str | Path) -> None:
        """Write the state to a file that every runtime reads, as ``RamState.save`` does, which says what it raises."""
        from safetensors.numpy import save_file

        with safetensors_written_aside(path) as aside:
            save_file(self._arrays, aside)

    @classmethod
    def load(cls, path: str | Path) -> Self:
        """Read a state file of any runtime. Raises what ``RamState.load`` does."""
        from safetensors import deserialize

        with safetensors_read(path):
            tensors = dict(deserialize(Path(path).read_bytes()))
        check(path, {name: _described(name, x["dtype"], x["shape"]) for name, x in tensors.items()})
        arrays = {name: _array(**tensor) for name, tensor in tensors.items()}
        arrays[POSITION] = np.broadcast_to(arrays[POSITION], arrays["memory.0"].shape[:1])
        return cls(arrays)

    def reorder(self, index: Tensor) -> Self:
        """Return a state whose row i is row ``index[i]`` of this one, as beam search needs; ``index`` is int64."""
        rows = index.numpy()
        return type(self)({name: x[rows] if x.ndim else x for name, x in self._arrays.items()})


class OnnxTensors(MutableMapping[str, NDArray[Any]]):
    """The arrays of a state. Their values can be written; their names, shapes and dtypes are fixed.

    ``tensors[name] = other`` copies ``other``, of any numeric dtype and layout; it raises ValueError if the shape
    differs. ``tensors[name]`` is a view, so that changing its shape or dtype in place does not change the state.
    """

    def __init__(self, arrays: dict[str, NDArray[Any]]) -> None:
        self._arrays = arrays

    def __getitem__(self, name: str) -> NDArray[Any]:
        return self._arrays[name].view()

    def __setitem__(self, name: str, value: ArrayLike) -> None:
        if name not in self._arrays:
            raise ValueError(f"the state has no {name!r}; its arrays are {', '.join(self._arrays)}")
        numbers, array = _numbers(name, value), self._arrays[name]
        if numbers.shape != array.shape:
            raise ValueError(
                f"state {name} has shape {list(array.shape)}; it cannot be assigned an array of {list(numbers.shape)}"
            )
        array[...] = numbers

    def __delitem__(self, name: str) -> None:
        raise TypeError(f"state {name} cannot be removed; the arrays of a state are fixed")

    def __iter__(self) -> Iterator[str]:
        return iter(self._arrays)

    def __len__(self) -> int:
        return len(self._arrays)


def _described(name: str, dtype: str, shape: list[int]) -> Described:
    """Describe a tensor of a safetensors file, such that ``check`` refuses one of another type than the known ones."""
    return Described(dtype, "F" in dtype if dtype in _STORED else name == POSITION, tuple(shape))


def _array(dtype: str, shape: list[int], data: bytes) -> NDArray[Any]:
    """Return a tensor of a safetensors file; numpy has no bfloat16, which is the upper half of float32."""
    found = np.frombuffer(data, _STORED[dtype])
    if dtype == "BF16":
        found = (found.astype(np.uint32) << 16).view(np.float32)
    return found.reshape(shape)


def _dtype(name: str) -> type[np.generic]:
    return np.int64 if name == POSITION else np.float32


def _numbers(name: str, value: ArrayLike) -> NDArray[Any]:
    """Convert ``value`` to an array. Raises ValueError if it cannot be cast to the dtype of the array ``name``."""
    array = np.asarray(value)
    if not np.can_cast(array.dtype, _dtype(name), casting="same_kind"):
        raise ValueError(f"state {name} is given {array.dtype}; it holds {np.dtype(_dtype(name))}")
    return array
