"""The state of an export between calls, as arrays that onnxruntime updates in place."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, MutableMapping
from typing import Any, Self

import numpy as np
from numpy.typing import ArrayLike, NDArray
from torch import Tensor

from ramnet import RamNetConfig, RamState

POSITION = "position"


class OnnxState:
    """The state of ``OnnxSession``: ``tensors``, arrays under the names of ``RamState.tensors``.

    A state owns its arrays, float32 and int64 positions, each contiguous and at one place for as long as the state
    lives, since ``OnnxSession.step`` updates them where they are. So what comes in is copied, and what ``tensors``
    gives are views to read and write.

    Raises:
        ValueError: for an array that is not of numbers, or positions that are not of whole ones.
    """

    def __init__(self, tensors: Mapping[str, ArrayLike]) -> None:
        self._arrays = {name: np.array(_numbers(name, x), dtype=_dtype(name), order="C") for name, x in tensors.items()}

    @property
    def tensors(self) -> OnnxTensors:
        """The arrays by name; assigning to one copies into it."""
        return OnnxTensors(self._arrays)

    @classmethod
    def zeros(cls, config: RamNetConfig, batch_size: int) -> Self:
        """The state before the first token."""
        return cls.of(RamState.zeros(config, batch_size))

    @classmethod
    def of(cls, state: RamState) -> Self:
        """A copy of a PyTorch state, as float32."""
        return cls({name: x if name == POSITION else x.float() for name, x in state.tensors().items()})

    def clone(self) -> Self:
        """A copy that shares nothing with this one."""
        return type(self)(self._arrays)

    def reorder(self, index: Tensor) -> Self:
        """The state whose batch entry i is this one's ``index[i]``, as a beam search needs; ``index`` is int64."""
        rows = index.numpy()
        return type(self)({name: x[rows] if x.ndim else x for name, x in self._arrays.items()})


class OnnxTensors(MutableMapping[str, NDArray[Any]]):
    """The arrays of a state. Their names, shapes and types stay; their numbers may be written.

    ``tensors[name] = other`` copies ``other`` of any numeric type and layout; ValueError for another shape. What is
    read is a view, so that a change of its own shape or type, as numpy allows in place, leaves the state as it is.
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
                f"state {name} has shape {list(array.shape)}, which stays; it cannot take {list(numbers.shape)}"
            )
        array[...] = numbers

    def __delitem__(self, name: str) -> None:
        raise TypeError(f"state {name} cannot be removed; a state keeps its arrays")

    def __iter__(self) -> Iterator[str]:
        return iter(self._arrays)

    def __len__(self) -> int:
        return len(self._arrays)


def _dtype(name: str) -> type[np.generic]:
    return np.int64 if name == POSITION else np.float32


def _numbers(name: str, value: ArrayLike) -> NDArray[Any]:
    """``value`` as an array; ValueError where its numbers are not of the kind that ``name`` holds."""
    array = np.asarray(value)
    if not np.can_cast(array.dtype, _dtype(name), casting="same_kind"):
        raise ValueError(f"state {name} is given {array.dtype}; it holds {np.dtype(_dtype(name))}")
    return array
