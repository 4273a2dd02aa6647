"""The weights of a model in the order and in the form that the C library takes them."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import BinaryIO, NamedTuple

import numpy as np
import torch
from torch import Tensor

from lowering.aot import rounding
from ramnet.config import RamNetConfig
from ramnet.state import write_safetensors
from schedules.deployment import digest

# The tokens that a library reads at once, for which a state has scratch memory, and the most that kernels are made for.
BLOCK, LONGEST_BLOCK = 32, 128
# The most slots that an address has in a kernel without a workspace: a list of them stays on the stack.
MOST_SLOTS = 128
# The type of the elements of a matrix in a safetensors file, by precision.
FILE_TYPES = {"float32": "F32", "bfloat16": "BF16", "int8": "I8", "int4": "U8"}
SCALED = ("int8", "int4")


class Weight(NamedTuple):
    """A tensor of the model. ``name`` is its parameter's; the scales of a matrix are named after it."""

    name: str
    shape: tuple[int, ...]
    is_matrix: bool = False


def of_model(config: RamNetConfig) -> list[Weight]:
    """Return the parameters in the library's order."""
    c, C, inner = config, config.hidden_size, config.intermediate_size
    embedding = Weight("embedding.weight", (c.vocab_size, C), True)

    def norm(name: str) -> list[Weight]:
        return [Weight(f"{name}.weight", (C,)), Weight(f"{name}.bias", (C,))]

    found = [embedding]
    for i in range(c.conv_layers):
        at = f"convs.{i}"
        found += [*norm(f"{at}.norm"), Weight(f"{at}.gate.weight", (C, C), True), Weight(f"{at}.gate.bias", (C,)),
                  Weight(f"{at}.taps", (c.conv_kernel, C))]  # fmt: skip
    for i, layer in enumerate(c.layers):
        at, bias = f"blocks.{i}", (2, layer.num_heads, layer.order, layer.sub_dim)
        addresses, values = math.prod(bias), layer.num_heads * layer.value_dim
        found += [
            *norm(f"{at}.mixer_norm"), Weight(f"{at}.mixer.log_scale", (2, layer.num_heads)),
            Weight(f"{at}.mixer.query_key_value.weight", (addresses + values, C), True),
            Weight(f"{at}.mixer.output.weight", (C, values), True),
        ]  # fmt: skip
        if inner:
            found += [*norm(f"{at}.ffn_norm"), Weight(f"{at}.ffn.gate_up.weight", (2 * inner, C), True),
                      Weight(f"{at}.ffn.down.weight", (C, inner), True)]  # fmt: skip
        if c.address_bias:  # last, so that the others have the same places without it
            found.append(Weight(f"{at}.mixer.address_bias", bias))
    return [*found, *norm("norm"), embedding if c.tie_embeddings else Weight("head.weight", (c.vocab_size, C), True)]


def check(config: RamNetConfig, precision: str) -> None:
    """Raise ValueError if the library cannot be built for a model with matrices of this precision."""
    if precision not in FILE_TYPES:
        raise ValueError(f"precision is {precision!r}; it must be one of {', '.join(FILE_TYPES)}")
    for layer in config.layers:
        if max(layer.top_k, layer.sub_dim) > MOST_SLOTS:
            raise ValueError(
                f"top_k is {layer.top_k} and sub_dim {layer.sub_dim}; a token that is compiled ahead of time has at"
                f" most {MOST_SLOTS}"
            )
    for weight in of_model(config) if precision in SCALED else ():
        if weight.is_matrix and weight.shape[1] % rounding.GROUP:
            raise ValueError(
                f"{weight.name} has {weight.shape[1]} inputs; {precision} needs a multiple of {rounding.GROUP}"
            )


def scale_name(name: str) -> str:
    """Return the name of the scales of a matrix."""
    return f"{name.removesuffix('.weight')}.scale"


def precision_of(weight: Weight, precision: str) -> str:
    """Return the precision of a matrix in a model of ``precision``.

    The embedding of an int4 model is int8: a token reads one row of it, and in int4 the divergence of a trained model's
    predictions from those of float32 is 0.019 bits rather than 0.011.
    """
    return "int8" if precision == "int4" and weight.name == "embedding.weight" else precision


class Storage(NamedTuple):
    """Type in a safetensors file, and shape, of a tensor of the weights' file."""

    dtype: str
    shape: tuple[int, ...]


def storage(precision: str, outputs: int, inputs: int) -> tuple[Storage, Storage | None]:
    """Return how the elements of a matrix [outputs, inputs] are stored, and its scales if it has some."""
    if precision == "int4":
        return Storage("U8", (outputs, inputs // 2)), Storage("BF16", (outputs, inputs // rounding.GROUP))
    scale = Storage("F32", (outputs,)) if precision == "int8" else None
    return Storage(FILE_TYPES[precision], (outputs, inputs)), scale


def stored(
    parameters: dict[str, Tensor], config: RamNetConfig, precision: str, moments: Mapping[str, Tensor] | None = None
) -> dict[str, Tensor]:
    """Return the tensors of the weights' file: matrices as ``precision``, all others as float32.

    Int4 is calibrated if there are ``moments`` of a matrix's inputs, by the matrix's name.
    """
    tensors = {}
    for weight in of_model(config):
        value = parameters[weight.name].detach().to("cpu", torch.float32)
        kind = precision_of(weight, precision) if weight.is_matrix else "float32"
        if kind == "int8":
            tensors[weight.name], tensors[scale_name(weight.name)] = rounding.int8(value)
        elif kind == "int4":
            found = rounding.int4(value, (moments or {}).get(weight.name))
            tensors[weight.name], tensors[scale_name(weight.name)] = found
        else:
            tensors[weight.name] = value.to(getattr(torch, kind)).contiguous()
    return tensors


def save(path: Path, tensors: dict[str, Tensor], config: RamNetConfig) -> None:
    """Write the weights' file. The library checks the digest of the config and the sums of the data in its metadata.

    Raises OSError if it cannot be written.
    """
    metadata = {"ramnet.config": digest(config), "ramnet.sums": "0" * 64}
    write_safetensors(path, tensors, metadata)
    with path.open("r+b") as file:
        size = int.from_bytes(file.read(8), "little")
        at = 8 + file.read(size).index(metadata["ramnet.sums"].encode())
        found = _sums(file)
        file.seek(at)
        file.write(found.encode())


def _sums(file: BinaryIO) -> str:
    """Return Fletcher's sums of the rest of a file: of its even and its odd words of 32 bits, then those of these sums.

    They are modulo 2^64. Sums of the words themselves do not overflow, so no altered word goes unnoticed.
    """
    totals, of_totals = np.zeros(2, np.uint64), np.zeros(2, np.uint64)
    while data := file.read(1 << 24):
        words = np.frombuffer(data + bytes(-len(data) % 8), "<u4").reshape(-1, 2).astype(np.uint64)
        following = np.arange(len(words), 0, -1, dtype=np.uint64)[:, None]
        of_totals += totals * np.uint64(len(words)) + (words * following).sum(0)
        totals += words.sum(0)
    return "".join(f"{value:016x}" for value in (*totals.tolist(), *of_totals.tolist()))


def read_by_token(config: RamNetConfig, precision: str) -> int:
    """Return the bytes of the weights that a token reads in a model of this configuration."""
    sizes = {"F32": 4, "BF16": 2, "I8": 1, "U8": 1}
    rows = list(table(config, precision))[2:]  # all but the embedding, of which it reads one row
    return sum(sizes[dtype] * math.prod(shape) for _, dtype, shape in rows if dtype is not None)


def restored(stored: dict[str, Tensor], config: RamNetConfig, precision: str) -> dict[str, Tensor]:
    """Return the parameters, float32, that the tensors of a weights' file stand for."""
    parameters = {}
    for weight in of_model(config):
        value = stored[weight.name]
        kind = precision_of(weight, precision) if weight.is_matrix else "float32"
        if kind == "int4":
            value = rounding.unpacked(value)
        parameters[weight.name] = value.to(torch.float32)
        if kind in SCALED:
            scale = stored[scale_name(weight.name)].to(torch.float32).view(value.shape[0], -1)
            parameters[weight.name] *= scale.repeat_interleave(value.shape[1] // scale.shape[1], 1)
    return parameters


def table(config: RamNetConfig, precision: str) -> Iterator[tuple[str, str | None, tuple[int, ...]]]:
    """Yield name, type in a file, and shape of each pointer that the library takes.

    A matrix has two: its elements and its scales, whose type is None if it has none.
    """
    for weight in of_model(config):
        if not weight.is_matrix:
            yield weight.name, "F32", weight.shape
            continue
        elements, scale = storage(precision_of(weight, precision), *weight.shape)
        yield weight.name, *elements
        yield scale_name(weight.name), *(scale or (None, weight.shape[:1]))
