"""The inputs and outputs of a model's graphs."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from itertools import zip_longest

from pydantic import BaseModel, ConfigDict

from ramnet.config import RamNetConfig

# Prefixes of the state's names as inputs and outputs; transformers.js recognises them.
PAST, PRESENT = "past_recurrent.", "present_recurrent."
SLOTS = "slots."
GRAPHS = ("decode", "prefill")
WEIGHTS = "weights.bin"


class Port(BaseModel):
    """One input or output of a graph; dynamic sizes are names."""

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True)

    name: str
    shape: list[int | str]
    dtype: str

    def __str__(self) -> str:
        return f"{self.name!r} {self.dtype} {self.shape}"


def inputs(config: RamNetConfig, kind: str) -> Iterator[Port]:
    """Yield the inputs of the graph ``kind`` of a model, in order."""
    yield Port(name="input_ids", shape=["batch", _tokens(kind)], dtype="int64")
    yield from state(config, PAST)


def outputs(config: RamNetConfig, kind: str) -> Iterator[Port]:
    """Yield the outputs of the graph ``kind`` of a model, in order."""
    yield Port(name="logits", shape=["batch", _tokens(kind), config.vocab_size], dtype="float32")
    yield from state(config, PRESENT)
    for layer, c in enumerate(config.layers):
        slots: list[int | str] = ["batch", _tokens(kind), 2, c.num_heads, c.top_k]
        yield Port(name=f"{SLOTS}{layer}", shape=slots, dtype="int32")


def difference(config: RamNetConfig, kind: str, found_inputs: Iterable[Port], found_outputs: Iterable[Port]) -> str:
    """Describe the first port that is not that of the graph ``kind`` of a model; empty if there is none."""
    for side, found, expected in (
        ("input", found_inputs, inputs(config, kind)),
        ("output", found_outputs, outputs(config, kind)),
    ):
        for port, right in zip_longest(found, expected):
            if port != right:
                return f"has {port or 'nothing'} as an {side} where its model has {right or 'nothing'}"
    return ""


def state(config: RamNetConfig, prefix: str = "") -> Iterator[Port]:
    """Yield the ports of ``RamState.tensors`` lazily, as a damaged config may have more layers than fit in memory."""
    recent: list[int | str] = ["batch", config.conv_kernel - 1, config.hidden_size]
    for layer, c in enumerate(config.layers):
        memory: list[int | str] = ["batch", c.num_heads, c.slots, c.value_dim]
        yield Port(name=f"{prefix}memory.{layer}", shape=memory, dtype="float32")
    for layer, c in enumerate(config.layers):
        yield Port(name=f"{prefix}mass.{layer}", shape=["batch", c.num_heads, c.slots], dtype="float32")
    for layer in range(config.conv_layers):
        yield Port(name=f"{prefix}conv.{layer}", shape=recent, dtype="float32")
    yield Port(name=f"{prefix}position", shape=["batch"], dtype="int64")


def _tokens(kind: str) -> int | str:
    return 1 if kind == "decode" else "tokens"
