"""A workload as a user writes it: "memory_scan N=256 T=4096 dtype=bfloat16"."""

from __future__ import annotations

from typing import Any

from ramnet.config import RamNetConfig
from schedules.workload import AXES, Workload


def parse(text: str, config: RamNetConfig, dtype: str = "float32") -> Workload:
    """The workload of an op by name, then sizes by the letters of the paper, and perhaps a dtype and constants.

    Args:
        config: gives the sizes and the constants that are not named; but T and R, tokens and rows of logits, are not a
            model's. N, a batch times its heads, is that of one sequence.
        dtype: where none is named.

    Raises:
        ValueError: for an unknown op, a size that it has not or that is missing, and what is no number.
    """
    op, *settings = text.split() or [""]
    if op not in AXES:
        raise ValueError(f"shape {text!r} has the op {op!r}; there are {', '.join(sorted(AXES))}")
    of_model = {
        "U": config.order, "P": config.sub_dim, "K": config.top_k, "M": config.slots, "D": config.value_dim,
        "N": config.num_heads, "H": config.num_heads, "C": config.hidden_size,
    }  # fmt: skip
    sizes = {axis: of_model[axis] for axis in AXES[op] if axis in of_model}
    constants = _constants(op, config)
    for setting in settings:
        name, _, value = setting.partition("=")
        if name in AXES[op]:
            sizes[name] = _number(text, setting, int)
            if sizes[name] < 1:
                raise ValueError(f"shape {text!r} has {setting}; it must be at least 1")
        elif name in constants:
            constants[name] = _number(text, setting, float)
        elif name == "dtype":
            dtype = value
        else:
            known = ", ".join((*AXES[op], *constants, "dtype"))
            raise ValueError(f"shape {text!r} has {setting!r}; {op} has {known}, each as NAME=VALUE")
    missing = [axis for axis in AXES[op] if axis not in sizes]
    if missing:
        raise ValueError(f"shape {text!r} lacks {' and '.join(missing)}")
    return Workload.model_validate(
        {"op": op, "shape": {axis: sizes[axis] for axis in AXES[op]}, "dtype": dtype, "constants": constants}
    )


def _constants(op: str, config: RamNetConfig) -> dict[str, float]:
    """Those that are compiled into a kernel of the op."""
    if not op.startswith(("memory_", "decode_heads")):
        return {}
    found = {"decay_power": config.decay_power, "eps": config.eps}
    return found | {"proxy_eps": config.proxy_eps} if op == "memory_scan_backward" else found


def _number(text: str, setting: str, of: type) -> Any:
    try:
        return of(setting.partition("=")[2])
    except ValueError:
        raise ValueError(f"shape {text!r} has {setting!r}, which is no number") from None
