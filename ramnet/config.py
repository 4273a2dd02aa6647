"""The hyper-parameters of a RAM-Net, validated on construction."""

from __future__ import annotations

import re
from collections.abc import Mapping
from functools import cached_property
from pathlib import Path
from typing import Annotated, Any, Generic, Literal, Self, TypeVar

from pydantic import BaseModel, ConfigDict, Field, ValidationError, WrapValidator, model_validator

from ramnet.files import read_text, write_text_atomic

# Limit on layers, convolution blocks and taps, each of which is an iteration of a Python loop in every call. A model
# of 1024 layers and 1024 convolution blocks is built in about 3 s on the meta device; the deepest published transformer
# has 1000 layers.
MOST_LAYERS = 1024
# Limit on the elements of a weight and of a layer's memory, 2**50 bytes in float32: sizes in bytes must fit int64.
MOST_NUMBERS = 2**48
BYTES = 256  # vocabulary size of a model whose token ids are bytes

_Size = Annotated[int, Field(gt=0, lt=2**31)]
# One number for all layers, or a list with one of each. ``RamLayerConfig`` checks the numbers.
_SizeByLayer = Annotated[
    int | tuple[int, ...], WrapValidator(lambda value, _: tuple(value) if isinstance(value, list) else value)
]
_T = TypeVar("_T")
AddressBias = Literal["zeros", "offsets"]
# float32 represents both 1e-30 and its reciprocal.
_Epsilon = Annotated[float, Field(ge=1e-30, le=1)]
_SMALLEST, _LARGEST = 1.2e-38, 3.4e38  # of float32, about

_PRESETS: dict[str, dict[str, Any]] = {
    # A byte-level language model that trains in minutes on two cores. Bits per byte after about 190 steps of 4096
    # bytes: 2.8 without convolution blocks, 2.4 with one, 2.3 with two. After 70 s on one core: 2.02, against 2.15 for
    # hidden_size 192.
    "tiny": {
        "vocab_size": 256, "hidden_size": 128, "num_layers": 2, "num_heads": 4, "value_dim": 32,
        "order": 4, "sub_dim": 4, "top_k": 8, "cape_full_layers": 1, "cape_half_layers": 1,
        "intermediate_size": 256, "conv_layers": 2,
    },
    # Multi-query associative recall by two RAM-Net layers, without convolution or FFN. The first, whose addresses move,
    # brings a key to its value; the second recalls. docs/learning.md changes each of these numbers.
    "mqar": {
        "vocab_size": 8192, "hidden_size": 64, "num_layers": 2, "num_heads": 4, "value_dim": 16,
        "order": (2, 3), "sub_dim": 4, "top_k": (4, 16), "cape_full_layers": 1, "cape_half_layers": 0,
        "intermediate_size": 0, "tie_embeddings": True, "decay_power": 0.25,
        "embedding_std": 1.0, "final_gain": 0.03, "address_bias": "offsets",
    },
    # The paper's language model: 340 769 632 parameters without the input embedding.
    "340m": {
        "vocab_size": 32000, "hidden_size": 1024, "num_layers": 27, "num_heads": 16, "value_dim": 64,
        "order": 5, "sub_dim": 4, "top_k": 8, "cape_full_layers": 4, "cape_half_layers": 4,
        "intermediate_size": 2816,
    },
}  # fmt: skip


def check_constants(decay_power: float = 1.0, eps: float = 1e-6, proxy_eps: float = 1.0) -> None:
    """Raise ValueError for a γ, ε or ε' that the ops do not take; kernels have the first two in float32."""
    if not 0 <= decay_power <= _LARGEST:
        raise ValueError(f"decay_power is {decay_power}; it must be finite and >= 0, also in float32")
    if not _SMALLEST <= eps <= _LARGEST:
        raise ValueError(f"eps is {eps}; it must be > 0 and finite, also in float32")
    if not 0 < proxy_eps <= 1:
        raise ValueError(f"proxy_eps is {proxy_eps}; it must be in (0, 1]")


class _Fields(BaseModel, Generic[_T]):
    """The fields of one layer, whose sizes are of the type ``_T``."""

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True, allow_inf_nan=False)

    hidden_size: _Size = Field(description="width of the residual stream")
    num_heads: _T = Field(description="H, heads of each layer")
    value_dim: _T = Field(description="D, value width of each head")
    order: _T = Field(description="U, sub-vectors in an address")
    sub_dim: _T = Field(description="P, digits of each sub-vector")
    top_k: _T = Field(description="K, slots touched by a write and by a read")
    decay_power: float = Field(1.0, ge=0, le=1e6, description="γ of PDMA")
    temperature: float = Field(1.0, ge=1e-6, le=1e6, description="τ of the product softmax")
    eps: _Epsilon = Field(1e-6, description="ε, added to the mass before a read divides by it")
    proxy_eps: _Epsilon = Field(0.01, description="ε' of PDMA's proxy gradient")
    address_bias: AddressBias | None = Field(None, description="initial bias of queries and keys; None has no bias")

    def __init__(self, **fields: Any) -> None:
        try:
            super().__init__(**fields)
        except ValidationError as error:
            raise ValueError(f"{type(self).__name__}: {one_line(error)}") from None


class RamLayerConfig(_Fields[_Size]):
    """Hyper-parameters of one RAM-Net layer; immutable.

    Raises:
        ValueError: if a field is out of range or does not fit the others; the message names the value.
    """

    sub_dim: int = Field(gt=1, lt=2**31, description="P, digits of each sub-vector")

    @model_validator(mode="after")
    def _addresses_fit(self) -> Self:
        if self.order > 30 or self.slots > 2**31 - 1:
            raise ValueError(f"sub_dim**order is {self.sub_dim}**{self.order} slots; int32 numbers at most {2**31 - 1}")
        if self.top_k > self.slots:
            raise ValueError(
                f"top_k is {self.top_k} but sub_dim**order has only {self.slots} slots; use top_k <= {self.slots}"
            )
        projected = 2 * self.num_heads * self.order * self.sub_dim + self.num_heads * self.value_dim
        _check_numbers(self.hidden_size * projected, self.num_heads * self.slots * self.value_dim)
        return self

    @property
    def slots(self) -> int:
        """M = P^U, the slots of each head."""
        return int(self.sub_dim**self.order)


class RamNetConfig(_Fields[_SizeByLayer]):
    """Hyper-parameters of a RAM-Net; immutable.

    ``num_heads``, ``value_dim``, ``order``, ``sub_dim`` and ``top_k`` are each one integer for all layers, or a list
    with one of each layer; ``layers`` has those of a layer.

    Raises:
        ValueError: if a field is out of range or does not fit the others; the message names the value, and the layer of
            a value in a list.
    """

    vocab_size: _Size = Field(description="number of token ids")
    num_layers: int = Field(gt=0, le=MOST_LAYERS, description="RAM-Net layers")
    cape_full_layers: int = Field(0, ge=0, description="first layers whose heads all use CAPE")
    cape_half_layers: int = Field(0, ge=0, description="next layers, half of whose heads use CAPE")
    intermediate_size: int = Field(0, ge=0, lt=2**31, description="SwiGLU width; 0 omits the FFN")
    conv_layers: int = Field(
        0, ge=0, le=MOST_LAYERS, description="gated short convolution blocks before the first layer"
    )
    conv_kernel: int = Field(3, gt=0, le=MOST_LAYERS, description="taps of each gated short convolution")
    tie_embeddings: bool = Field(False, description="the output head shares the embedding's weights")
    embedding_std: float = Field(0.02, gt=0, le=1e6, description="standard deviation of the initial embedding")
    norm_eps: _Epsilon = Field(1e-5, description="ε of the LayerNorms")
    final_gain: float = Field(1.0, gt=0, le=1e6, description="initial gain of the LayerNorm before the output head")

    @model_validator(mode="after")
    def _layers_fit(self) -> Self:
        for name, values in self._lists().items():
            if len(values) != self.num_layers:
                raise ValueError(f"{name} has {len(values)} numbers but there are {self.num_layers} layers")
        _ = self.layers  # raises what is wrong with a layer
        if self.cape_full_layers + self.cape_half_layers > self.num_layers:
            raise ValueError(
                f"cape_full_layers + cape_half_layers is {self.cape_full_layers + self.cape_half_layers}"
                f" but there are {self.num_layers} layers"
            )
        _check_numbers(self.hidden_size * max(self.vocab_size, 2 * self.intermediate_size))
        return self

    def _lists(self) -> dict[str, tuple[int, ...]]:
        """Return the fields that are lists."""
        fields = ((name, getattr(self, name)) for name in RamLayerConfig.model_fields)
        return {name: value for name, value in fields if isinstance(value, tuple)}

    @cached_property
    def layers(self) -> tuple[RamLayerConfig, ...]:
        """The configuration of each layer."""
        fields, lists = {name: getattr(self, name) for name in RamLayerConfig.model_fields}, self._lists()
        found = []
        for i in range(self.num_layers if lists else 1):
            try:
                found.append(RamLayerConfig(**{**fields, **{name: values[i] for name, values in lists.items()}}))
            except ValueError as error:
                where = f"layer {i}: " if lists else ""
                raise ValueError(f"{where}{str(error).removeprefix('RamLayerConfig: ')}") from None
        return tuple(found if lists else found * self.num_layers)

    @property
    def kinds(self) -> list[RamLayerConfig]:
        """The configurations in ``layers``, each once."""
        return list(dict.fromkeys(self.layers))

    def model_copy(self, *, update: Mapping[str, Any] | None = None, deep: bool = False) -> Self:
        """Return a copy with the fields ``update`` replaced, which is checked as on construction."""
        return type(self)(**{**self.model_dump(), **(update or {})})  # without the layers of this one

    def cape_heads(self, layer: int) -> int:
        """Return how many heads of layer ``layer``, counted from 0, use CAPE; these are the layer's first heads."""
        heads = self.layers[layer].num_heads
        if layer < self.cape_full_layers:
            return heads
        return heads // 2 if layer < self.cape_full_layers + self.cape_half_layers else 0

    @classmethod
    def preset(cls, name: str, **overrides: Any) -> RamNetConfig:
        """Return the configuration called ``name`` with the fields ``overrides`` replaced.

        Raises ValueError if there is no preset of that name.
        """
        if name not in _PRESETS:
            raise ValueError(f"preset {name!r} is unknown; there are {', '.join(sorted(_PRESETS))}")
        return cls(**{**_PRESETS[name], **overrides})

    @classmethod
    def load(cls, path: str | Path) -> RamNetConfig:
        """Read a configuration that ``save`` wrote. Raises ValueError, naming the file, if it is not one."""
        text = read_text(path)
        try:
            return cls.model_validate_json(text)
        except ValidationError as error:
            if re.search(r'"model_type":\s*"ramnet"', text):
                command = f"ramnet convert {Path(path).parent} FOLDER"
                raise ValueError(f"{path} is of transformers' format; make one of this project: {command}") from None
            problem = one_line(error).removeprefix("RamNetConfig: ")
            raise ValueError(f"{path} is not a RamNetConfig: {problem}") from None

    def save(self, path: str | Path) -> None:
        """Write the configuration as JSON, atomically."""
        write_text_atomic(path, self.to_json())

    def to_json(self) -> str:
        """Return the text that ``save`` writes."""
        return self.model_dump_json(indent=2) + "\n"


def _check_numbers(*numbers: int) -> None:
    if max(numbers) > MOST_NUMBERS:
        raise ValueError(f"a weight or a layer's memory would hold {max(numbers)} numbers; at most {MOST_NUMBERS}")


def one_line(error: ValidationError) -> str:
    """Return the first problem of a validation error as one sentence that names the value."""
    first = error.errors()[0]
    message = first["msg"].removeprefix("Value error, ")
    if not first["loc"]:
        return message
    field = ".".join(map(str, first["loc"]))
    return f"{field} is missing" if first["type"] == "missing" else f"{field} = {_shown(first['input'])}: {message}"


def _shown(value: Any) -> str:
    try:
        return repr(value)[:80]
    except ValueError:  # Python does not convert integers of more than 4300 digits to text
        return "an integer of thousands of digits"
