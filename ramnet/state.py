"""What a RAM-Net remembers: a value of fixed size, however long the sequence behind it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol, Self

import torch
from torch import Tensor

from ramnet.config import RamLayerConfig, RamNetConfig
from ramnet.files import written_aside

# Axes of each tensor of a state; all but the position hold floating numbers.
_RANKS = {"memory": 4, "mass": 3, "conv": 3, "position": 1}


class Layer(Protocol):
    """A ``ramnet.RamLayer``, of which the state concerns the configuration alone."""

    config: RamLayerConfig


@dataclass
class RamState:
    """The state of a model, or of a list of ``RamLayer``, after ``position`` tokens of each row.

    Attributes:
        memory: for each RAM-Net layer, S, [B, H, M, D].
        mass: for each RAM-Net layer, z, [B, H, M].
        conv: for each gated convolution block, its last inputs, [B, conv_kernel − 1, hidden].
        position: int64 [B], the tokens that each row has seen.
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
        """The state before the first token: S = 0, z = 1/M (paper, step 5).

        Args:
            layers: the configuration of a model, or ``RamLayer`` modules in any number, of any sizes.
        """
        if batch_size < 1:
            raise ValueError(f"batch_size is {batch_size}; it must be at least 1")
        memory, mass, conv = _shapes(layers, batch_size).values()
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
        """``state``, checked; where it is None, a fresh one for layers with weights as ``weight``.

        Errors as in ``check``.
        """
        if state is None:
            # float32 whatever the weights are, or a long sequence would round at every write.
            exact = torch.promote_types(weight.dtype, torch.float32)
            return cls.zeros(layers, batch_size, dtype=exact, device=device)
        state.check(layers, batch_size, device, in_place)
        return state

    @property
    def batch_size(self) -> int:
        return self.memory[0].shape[0]

    def tensors(self) -> dict[str, Tensor]:
        """Every tensor under the name it has in files and graphs: memory.0, mass.0, …, conv.0, …, position."""
        named = {
            f"{name}.{i}": tensor
            for name, layers in (("memory", self.memory), ("mass", self.mass), ("conv", self.conv))
            for i, tensor in enumerate(layers)
        }
        return named | {"position": self.position}

    def clone(self) -> Self:
        """A copy that shares nothing with this one."""
        return type(self)(
            [x.clone() for x in self.memory],
            [x.clone() for x in self.mass],
            [x.clone() for x in self.conv],
            self.position.clone(),
        )

    def reorder(self, index: Tensor) -> Self:
        """The state whose batch entry i is this one's ``index[i]``, as a beam search needs; ``index`` is int64."""
        return type(self)(
            [x.index_select(0, index) for x in self.memory],
            [x.index_select(0, index) for x in self.mass],
            [x.index_select(0, index) for x in self.conv],
            self.position.index_select(0, index),
        )

    @classmethod
    def merge(cls, states: Sequence[RamState]) -> Self:
        """One state of the rows of all ``states``, in their order; rows may have seen different numbers of tokens.

        ValueError for no states, and for layers, sizes, types or devices that differ.
        """
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
        """States of ``sizes`` rows each, in the order of the rows, or of one row each; they share nothing with this.

        ValueError for sizes that are not at least 1, or do not add up to the batch size.
        """
        sizes = [1] * self.batch_size if sizes is None else list(sizes)
        if sum(sizes) != self.batch_size or min(sizes) < 1:
            raise ValueError(f"sizes is {sizes}; they must be at least 1 and add up to {self.batch_size} rows")
        rows = torch.arange(self.batch_size, device=self.position.device).split(sizes)
        return [self.reorder(index) for index in rows]

    def layers(self) -> list[Self]:
        """A state for each RAM-Net layer, to hand to it: memory and mass are this one's, the position is a copy."""
        pairs = zip(self.memory, self.mass, strict=True)
        return [type(self)([memory], [mass], [], self.position.clone()) for memory, mass in pairs]

    @classmethod
    def of_layers(cls, states: Sequence[RamState]) -> Self:
        """One state of what ``layers`` took apart, sharing its tensors.

        ValueError for no states, and where positions differ, as of layers that have not read the same tokens.
        """
        if not states:
            raise ValueError("states is empty; there must be at least one")
        position = states[0].position
        for i, state in enumerate(states):
            if can_be_read(position) and not torch.equal(state.position, position):
                raise ValueError(
                    f"states[{i}] is at position {state.position.tolist()} and states[0] at {position.tolist()};"
                    " states of one sequence are at the same"
                )
        memory, mass, conv = ([x for s in states for x in getattr(s, name)] for name in ("memory", "mass", "conv"))
        return cls(memory, mass, conv, position)

    def save(self, path: str | Path) -> None:
        """Write the state as safetensors, whole or not at all."""
        write_safetensors(path, {name: x.contiguous() for name, x in self.tensors().items()})

    @classmethod
    def load(cls, path: str | Path) -> Self:
        """Read a state that ``save`` wrote; ValueError, naming the file, where it is none.

        Files of version 0.1.0 hold one position for all rows, which each row then takes.
        """
        tensors = read_safetensors(path)
        layers: dict[str, list[Tensor]] = {}
        for name in ("memory", "mass", "conv"):
            count = sum(key.startswith(f"{name}.") for key in tensors)
            layers[name] = [tensors[f"{name}.{i}"] for i in range(count) if f"{name}.{i}" in tensors]
        memory, mass = layers["memory"], layers["mass"]
        known = sum(map(len, layers.values())) + 1
        if "position" not in tensors or known != len(tensors) or not memory or len(memory) != len(mass):
            raise ValueError(f"{path} is not a RAM-Net state: it holds {', '.join(sorted(tensors)[:4]) or 'nothing'}")
        if tensors["position"].dim() == 0 and memory[0].dim() > 0:
            tensors["position"] = tensors["position"].repeat(memory[0].shape[0])
        for name, tensor in tensors.items():
            kind = name.split(".")[0]
            fits = tensor.dim() == _RANKS[kind] and tensor.is_floating_point() != (kind == "position")
            if not fits or tensor.shape[0] != memory[0].shape[0]:
                raise ValueError(f"{path} is not a RAM-Net state: {name} is {tensor.dtype} {list(tensor.shape)}")
        return cls(memory, mass, layers["conv"], tensors["position"])

    def check(
        self,
        layers: RamNetConfig | Sequence[Layer],
        batch_size: int,
        device: torch.device,
        in_place: bool = False,
    ) -> None:
        """Refuse what is no state of ``layers`` (as in ``zeros``) at ``batch_size`` on ``device``.

        Args:
            in_place: the state is about to be updated in place, so every tensor must also be contiguous, without
                gradients, and no inference tensor outside of inference mode.

        Raises:
            ValueError: for wrong sizes, shapes or devices, a negative position, or what cannot be updated.
            TypeError: for wrong types.
        """
        for name, shapes in _shapes(layers, batch_size).items():
            tensors: list[Tensor] = getattr(self, name)
            if len(tensors) != len(shapes):
                raise ValueError(f"state.{name} has {len(tensors)} layers; this model has {len(shapes)}")
            for i, (tensor, shape) in enumerate(zip(tensors, shapes, strict=True)):
                _check(f"state.{name}[{i}]", tensor, shape, device, in_place)
                if not tensor.is_floating_point():
                    raise TypeError(f"state.{name}[{i}] is {tensor.dtype}; it must be a floating type")
        for i, (memory, mass) in enumerate(zip(self.memory, self.mass, strict=True)):
            if memory.dtype != mass.dtype:
                raise TypeError(
                    f"state.mass[{i}] is {mass.dtype} but state.memory[{i}] is {memory.dtype}; use one type"
                )
        _check("state.position", self.position, (batch_size,), device, in_place)
        if self.position.dtype not in (torch.int64, torch.int32):
            raise TypeError(f"state.position is {self.position.dtype}; it must be torch.int64")
        if can_be_read(self.position) and batch_size and (lowest := int(self.position.min())) < 0:
            raise ValueError(f"state.position holds {lowest}; it must be >= 0")


# torch.export, torch.func and compiled callers take a state apart into its tensors, and put it together again.
torch.export.register_dataclass(RamState, serialized_type_name="ramnet.RamState")
# torch.load, by which torch.export.load reads example inputs, makes one of tensors and needs no trust for it.
torch.serialization.add_safe_globals([RamState])


def _shapes(layers: RamNetConfig | Sequence[Layer], batch_size: int) -> dict[str, list[tuple[int, ...]]]:
    """The shapes of memory, mass and conv, layer by layer."""
    convs: list[tuple[int, ...]] = []
    if isinstance(layers, RamNetConfig):
        convs = [(batch_size, layers.conv_kernel - 1, layers.hidden_size)] * layers.conv_layers
        configs: list[RamLayerConfig] = [layers] * layers.num_layers
    else:
        configs = [layer.config for layer in layers]
    heads: list[tuple[int, ...]] = [(batch_size, c.num_heads, c.slots) for c in configs]
    return {"memory": [(*h, c.value_dim) for h, c in zip(heads, configs, strict=True)], "mass": heads, "conv": convs}


def can_be_read(tensor: Tensor) -> bool:
    """Whether there is a number, and reading it waits for nothing: not on a GPU, nor while a graph is traced."""
    return tensor.device.type == "cpu" and not torch.compiler.is_compiling()


def _check(name: str, tensor: Tensor, shape: tuple[int, ...], device: torch.device, in_place: bool) -> None:
    if tensor.shape != shape:
        raise ValueError(f"{name} has shape {list(tensor.shape)}; it must be {list(shape)}")
    if tensor.device != device:
        raise ValueError(f"{name} is on {tensor.device} but input_ids is on {device}")
    if not in_place:
        return
    if not tensor.is_contiguous():
        raise ValueError(f"{name} has strides {list(tensor.stride())}; only a contiguous state is updated in place")
    if tensor.requires_grad and torch.is_grad_enabled():
        raise ValueError(f"{name} requires gradients, which a state that is updated in place cannot have")
    if not torch.compiler.is_compiling() and tensor.is_inference() and not torch.is_inference_mode_enabled():
        raise ValueError(
            f"{name} was made in torch.inference_mode(), outside of which it is not updated; go on with state.clone()"
        )


def write_safetensors(path: str | Path, tensors: dict[str, Tensor], metadata: dict[str, str] | None = None) -> None:
    """Write a safetensors file, whole or not at all; OSError, naming the file, where it cannot be written."""
    from safetensors import SafetensorError
    from safetensors.torch import save_file

    with written_aside(path) as aside:
        try:
            save_file(tensors, aside, metadata)
        except SafetensorError as error:  # a full disk, for one; it is no OSError
            raise OSError(f"{path} cannot be written: {error}") from None


def read_safetensors(path: str | Path) -> dict[str, Tensor]:
    """The tensors of a safetensors file; ValueError, naming the file, where it is none."""
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    if not Path(path).is_file():
        raise ValueError(f"{path} is not a file; a safetensors file was expected there")
    try:
        # Copies: the file's own pages would change with it, and lie on 8 bytes, where torch's lie on 64.
        return {name: x.clone() for name, x in load_file(path).items()}
    except SafetensorError as error:
        raise ValueError(f"{path} is not a safetensors file: {error}") from None
