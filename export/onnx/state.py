"""The state of an exported model, held in arrays that onnxruntime updates in place."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, MutableMapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, Self

import numpy as np
from numpy.typing import ArrayLike, NDArray

from export.onnx import ports
from ramnet.config import RamNetConfig

if TYPE_CHECKING:
    from torch import Tensor

    from ramnet import RamState

POSITION = "position"


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
        from torch import from_numpy

        from ramnet.state import write_safetensors

        write_safetensors(path, {name: from_numpy(x) for name, x in self._arrays.items()})

    @classmethod
    def load(cls, path: str | Path) -> Self:
        """Read a state file of any runtime. Raises what ``RamState.load`` does."""
        from ramnet.state import RamState

        return cls.of(RamState.load(path))

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


def _dtype(name: str) -> type[np.generic]:
    return np.int64 if name == POSITION else np.float32


def _numbers(name: str, value: ArrayLike) -> NDArray[Any]:
    """Convert ``value`` to an array. Raises ValueError if it cannot be cast to the dtype of the array ``name``."""
    array = np.asarray(value)
    if not np.can_cast(array.dtype, _dtype(name), casting="same_kind"):
        raise ValueError(f"state {name} is given {array.dtype}; it holds {np.dtype(_dtype(name))}")
    return array
