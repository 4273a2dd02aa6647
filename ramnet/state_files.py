"""What a state file holds. This needs no PyTorch."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import NamedTuple

# The number of dimensions of each tensor of a state. All but the position are floating.
RANKS = {"memory": 4, "mass": 3, "conv": 3, "position": 1}


class Described(NamedTuple):
    """The type and shape of a tensor in a file."""

    dtype: str
    floating: bool
    shape: tuple[int, ...]


def check(path: str | Path, tensors: Mapping[str, Described]) -> dict[str, int]:
    """Return how many tensors of memory, mass and conv a file holds.

    Raises ValueError, naming the file, if they are not those of a state. Files of version 0.1.0 hold a single position,
    which is of every row.
    """
    counts = {name: sum(key.startswith(f"{name}.") for key in tensors) for name in ("memory", "mass", "conv")}
    names = {"position", *(f"{name}.{i}" for name, count in counts.items() for i in range(count))}
    if names != tensors.keys() or not counts["memory"] or counts["memory"] != counts["mass"]:
        raise ValueError(f"{path} is not a RAM-Net state: it holds {', '.join(sorted(tensors)[:4]) or 'nothing'}")
    rows = tensors["memory.0"].shape[:1]
    for name, (dtype, floating, found) in tensors.items():
        shape = found or (rows if name == "position" else ())
        kind = name.split(".")[0]
        if len(shape) != RANKS[kind] or floating == (kind == "position") or shape[:1] != rows:
            raise ValueError(f"{path} is not a RAM-Net state: {name} is {dtype} {list(shape)}")
    return counts
