"""The recurrent state of a RAM-Net, whose size does not depend on the length of the sequence."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Self

import torch
from torch import Tensor

from ramnet.config import RamNetConfig
from ramnet.files import safetensors_read, safetensors_written_aside
from ramnet.state_checks import Layer, can_be_read, check_state, shapes_of
from ramnet.state_files import Described, check


@dataclass(eq=False)  # == of tensors is not one answer
class RamState:
    """The state of a model, or of a list of ``RamLayer``, after ``position`` tokens of each row.

    Attributes:
        memory: S of each RAM-Net layer, [B, H, M, D] (paper, step 5).
        mass: z of each RAM-Net layer, [B, H, M] (paper, step 5).
        conv: the last normalised inputs of each gated convolution block, [B, conv_kernel − 1, C].
        position: int64 [B], the number of tokens that each row has read.
    """

    memory: list[Tensor]
    mass: list[Tensor]
    conv: list[Tensor]
    position: Tensor

    @classmethod
    def zeros(
        cls,
        layers: RamNetConfig | Sequence[Layer],
        batch_size: int,
        dtype: torch.dtype = torch.float32,
        device: torch.device | str = "cpu",
    ) -> Self:
        """Return the state before the first token: S = 0, z = 1/M (paper, step 5).

        Args:
            layers: the configuration of a model, or a list of ``RamLayer`` modules, whose sizes may differ.
            batch_size: B ≥ 1.
            dtype: of all tensors but the position.
        """
        if batch_size < 1:
            raise ValueError(f"batch_size is {batch_size}; it must be at least 1")
        if not isinstance(layers, RamNetConfig | Iterable):
            raise TypeError(f"layers is a {type(layers).__name__}; it must be a RamNetConfig, or a list of RamLayer")
        memory, mass, conv = shapes_of(layers, batch_size).values()
        return cls(
            memory=[torch.zeros(shape, dtype=dtype, device=device) for shape in memory],
            mass=[torch.full(shape, 1 / shape[2], dtype=dtype, device=device) for shape in mass],
            conv=[torch.zeros(shape, dtype=dtype, device=device) for shape in conv],
            position=torch.zeros(batch_size, dtype=torch.int64, device=device),
        )

    @classmethod
    def ready(
        cls, state: RamState | None, layers: RamNetConfig | Sequence[Layer], batch_size: int, weight: Tensor,
        device: torch.device, in_place: bool,
    ) -> RamState:  # fmt: skip
        """Return ``state`` after ``check``; if it is None, a fresh one in float32, or float64 if ``weight`` is."""
        if state is None:
            # At least float32: in a narrower dtype, the rounding of every write adds up over a long sequence.
            exact = torch.promote_types(weight.dtype, torch.float32)
            return cls.zeros(layers, batch_size, dtype=exact, device=device)
        if not isinstance(state, cls):
            raise TypeError(f"state is a {type(state).__name__}; it must be a {cls.__name__}")
        state.check(layers, batch_size, device, in_place)
        return state

    @property
    def batch_size(self) -> int:
        return self.memory[0].shape[0]

    def tensors(self) -> dict[str, Tensor]:
        """Return every tensor by its name in files and graphs: memory.0, …, mass.0, …, conv.0, …, position."""
        named = {
            f"{name}.{i}": tensor
            for name, layers in (("memory", self.memory), ("mass", self.mass), ("conv", self.conv))
            for i, tensor in enumerate(layers)
        }
        return named | {"position": self.position}

    def clone(self) -> Self:
        """Return a copy that shares no memory with this state."""
        return type(self)(
            [x.clone() for x in self.memory],
            [x.clone() for x in self.mass],
            [x.clone() for x in self.conv],
            self.position.clone(),
        )

    def reorder(self, index: Tensor) -> Self:
        """Return a state whose row i is row ``index[i]`` of this one, as beam search needs; ``index`` is int64 [B'].

        Raises ValueError if there is no such row; on a GPU, torch's device-side assertion stops at it. Raises TypeError
        if ``index`` is not a tensor.
        """
        if not isinstance(index, Tensor):
            raise TypeError(f"index is a {type(index).__name__}; it must be a tensor of torch.int64")
        if can_be_read(index) and index.numel():
            for row in (int(each) for each in index.aminmax()):
                if not 0 <= row < self.batch_size:
                    raise ValueError(f"index holds {row}; the rows of this state are 0..{self.batch_size - 1}")
        return type(self)(
            [x.index_select(0, index) for x in self.memory],
            [x.index_select(0, index) for x in self.mass],
            [x.index_select(0, index) for x in self.conv],
            self.position.index_select(0, index),
        )

    @classmethod
    def merge(cls, states: Sequence[RamState]) -> Self:
        """Concatenate the rows of ``states``. Their positions may differ.

        Raises ValueError if ``states`` is empty, or their layers, shapes, dtypes or devices differ; TypeError if one is
        not a state.
        """
        states = list(states)
        for i, state in enumerate(states):
            if not isinstance(state, RamState):
                raise TypeError(f"states[{i}] is a {type(state).__name__}; it must be a RamState")
        if not states:
            raise ValueError("states is empty; there must be at least one")
        first = states[0].tensors()
        for i, state in enumerate(states):
            tensors = state.tensors()
            if tensors.keys() != first.keys():
                unlike = sorted(tensors.keys() ^ first.keys())[0]
                raise ValueError(f"states[{i}] and states[0] are not of the same layers: one has no {unlike}")
            for name, tensor in tensors.items():
                mine, right = (f"{x.dtype} {list(x.shape[1:])} on {x.device}" for x in (tensor, first[name]))
                if mine != right:
                    raise ValueError(f"a row's {name} is {mine} in states[{i}] but {right} in states[0]")
        memory, mass, conv = (
            [torch.cat(rows) for rows in zip(*(getattr(s, name) for s in states), strict=True)]
            for name in ("memory", "mass", "conv")
        )
        return cls(memory, mass, conv, torch.cat([s.position for s in states]))

    def split(self, sizes: Sequence[int] | None = None) -> list[Self]:
        """Split the rows into states of ``sizes`` rows each, or of one row each if None. They are copies.

        Raises ValueError if a size is below 1, or the sizes do not add up to the batch size.
        """
        sizes = [1] * self.batch_size if sizes is None else list(sizes)
        if sum(sizes) != self.batch_size or min(sizes, default=1) < 1:
            raise ValueError(f"sizes is {sizes}; they must be at least 1 and add up to {self.batch_size} rows")
        rows = torch.arange(self.batch_size, device=self.position.device).split(sizes)
        return [self.reorder(index) for index in rows]

    def layers(self) -> list[Self]:
        """Return a state for each RAM-Net layer, sharing memory and mass with this one; the position is copied."""
        pairs = zip(self.memory, self.mass, strict=True)
        return [type(self)([memory], [mass], [], self.position.clone()) for memory, mass in pairs]

    @classmethod
    def of_layers(cls, states: Sequence[RamState]) -> Self:
        """Join states of single layers, as ``layers`` returns, into one that shares their tensors.

        Raises ValueError if ``states`` is empty, or their positions differ.
        """
        if not states:
            raise ValueError("states is empty; there must be at least one")
        position = states[0].position
        for i, state in enumerate(states):
            if can_be_read(position) and not torch.equal(state.position, position):
                raise ValueError(
                    f"states[{i}] is at position {state.position.tolist()} and states[0] at {position.tolist()};"
                    " all layers must be at the same position"
                )
        memory, mass, conv = ([x for s in states for x in getattr(s, name)] for name in ("memory", "mass", "conv"))
        return cls(memory, mass, conv, position)

    def save(self, path: str | Path) -> None:
        """Write the state as safetensors, atomically.

        Raises:
            OSError: if the file cannot be written; the message names it.
            ValueError: if ``load`` would not read it: a number of layers, a shape or a dtype is wrong.
        """
        tensors = self.tensors()
        _described(path, tensors)
        write_safetensors(path, tensors)

    @classmethod
    def load(cls, path: str | Path) -> Self:
        """Read a state that ``save`` wrote. Raises ValueError, naming the file, if it is not one.

        Files of version 0.1.0 hold a single position, which is used for every row.
        """
        tensors = read_safetensors(path)
        counts = _described(path, tensors)
        layers = {name: [tensors[f"{name}.{i}"] for i in range(count)] for name, count in counts.items()}
        position = tensors["position"]
        if position.dim() == 0:
            position = position.repeat(layers["memory"][0].shape[0])
        return cls(**layers, position=position)

    def check(
        self,
        layers: RamNetConfig | Sequence[Layer],
        batch_size: int,
        device: torch.device,
        in_place: bool = False,
    ) -> None:
        """Check that this is a state of ``layers`` (as in ``zeros``) for ``batch_size`` rows on ``device``.

        Args:
            in_place: also check that every tensor can be updated in place: it must be contiguous, of one layer only,
                not require gradients and, outside inference mode, not be an inference tensor.

        Raises:
            ValueError: if a number of layers, a shape or a device is wrong, a position is not in 0..2^62, or 0..2^30 in
                int32, or a tensor cannot be updated in place.
            TypeError: if a dtype is wrong.
        """
        check_state(self, layers, batch_size, device, in_place)


# A pytree, so that torch.export, torch.func and torch.compile can flatten a state into its tensors.
torch.export.register_dataclass(RamState, serialized_type_name="ramnet.RamState")
# torch.export.load reads example inputs by torch.load, which constructs only classes that are known to be safe.
torch.serialization.add_safe_globals([RamState])


def _described(path: str | Path, tensors: dict[str, Tensor]) -> dict[str, int]:
    """Return what ``state_files.check`` does."""
    described = {name: Described(str(x.dtype), x.is_floating_point(), tuple(x.shape)) for name, x in tensors.items()}
    return check(path, described)


def write_safetensors(path: str | Path, tensors: dict[str, Tensor], metadata: dict[str, str] | None = None) -> None:
    """Write a safetensors file atomically. A tensor that stands under two names is written twice.

    Raises OSError, naming the file, if it cannot be written.
    """
    from safetensors.torch import save_file

    tensors = {name: x.contiguous() for name, x in tensors.items()}
    places: set[int] = set()
    for name, x in tensors.items():
        if x.data_ptr() in places:  # which safetensors refuses
            tensors[name] = x.clone()
        places.add(x.data_ptr())
    with safetensors_written_aside(path) as aside:
        save_file(tensors, aside, metadata)


def read_safetensors(path: str | Path) -> dict[str, Tensor]:
    """Read the tensors of a safetensors file. Raises ValueError, naming the file, if it is not one."""
    from safetensors.torch import load_file

    with safetensors_read(path):
        # Copies: mapped pages would change with the file, and are aligned to 8 bytes instead of torch's 64.
        return {name: x.clone() for name, x in load_file(path).items()}
